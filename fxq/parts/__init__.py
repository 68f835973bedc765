"""Models that cannot be traced whole: their largest traceable parts, compiled one by one."""
