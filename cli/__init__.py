"""The command line of fxq. Only this wing knows typer and rich."""
