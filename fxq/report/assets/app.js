// What the controls do; the page's state is a step, a node, and a panel, also in its address.

const byId = (id) => document.getElementById(id);

const app = {
  step: lastStep, node: null, panel: "step", graph: null,

  go(step) {
    app.step = Math.max(0, Math.min(lastStep, step));
    app.graph.show(app.step);
    app.refresh();
    app.say(`Step ${app.step} of ${lastStep}, ${stepTitle(app.step)}: ${plural(changes[app.step].size, "change")}`);
  },

  select(node, travel = false) {
    if (node === undefined) return;
    app.node = node;
    app.graph.selected = node;
    if (node !== null) {
      app.panel = "node";
      if (travel && !recordAt(app.step, node)) {
        app.step = nearestStep(node, app.step);
        app.graph.show(app.step);
      }
      if (recordAt(app.step, node)) app.graph.reveal(node);
      app.say(`${data.names[node]}, ${recordAt(app.step, node)?.op || "not in this step"}`);
    }
    app.graph.draw();
    app.refresh();
  },

  open(panel) {
    app.panel = panel;
    app.refresh();
  },

  refresh() {
    byId("slider").value = app.step;
    byId("slider").setAttribute("aria-valuetext", `${app.step} ${stepTitle(app.step)}`);
    byId("step-name").textContent = `${app.step} ${stepTitle(app.step)}`;
    byId("previous").disabled = app.step === 0;
    byId("next").disabled = app.step === lastStep;
    for (const button of byId("pass-list").querySelectorAll("button")) {
      if (Number(button.dataset.step) === app.step) button.setAttribute("aria-current", "step");
      else button.removeAttribute("aria-current");
    }
    for (const tab of byId("tabs").children) {
      const on = tab.id === `tab-${app.panel}`;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
    }
    byId("graph").setAttribute("aria-label", `Graph after ${stepTitle(app.step)}, ${plural(app.graph.nodes.length, "node")}`
      + (app.node === null ? "" : `, ${data.names[app.node]} selected`));
    app.showPanel();
    const place = new URLSearchParams({ step: app.step, panel: app.panel });
    if (app.node !== null) place.set("node", data.names[app.node]);
    history.replaceState(null, "", `#${place}`);
  },

  showPanel() {
    const panel = byId("panels").firstElementChild;
    panel.setAttribute("aria-labelledby", `tab-${app.panel}`);
    panel.replaceChildren(...PANELS[app.panel][1]());
    if (app.shown !== `${app.panel} ${app.node}`) byId("panels").scrollTop = 0;
    app.shown = `${app.panel} ${app.node}`;
  },

  say(words) { byId("live").textContent = words; },
};

// ---- what is there from the start ------------------------------------------------------------

function buildSummary() {
  const { metadata } = data;
  const steps = data.steps;
  const accuracy = ["float", "compiled"].map((name) => metadata.accuracy?.[name]?.top1).filter((value) => typeof value === "number");
  const layers = (data.ledger || []).filter((entry) => entry.layer);
  const recipe = /^name = "(.*)"$/m.exec(data.recipe)?.[1];
  const rows = [
    ["Nodes", graphs.length ? `${graphs[0].size} → ${graphs[lastStep].size}` : "0"],
    ["Layers on integers", layers.length ? `${layers.filter((entry) => entry.where === "int8").length} of ${layers.length}` : ""],
    ["Accuracy", accuracy.length === 2 ? `${(100 * accuracy[0]).toFixed(2)} → ${(100 * accuracy[1]).toFixed(2)} %` : ""],
    ["SQNR", decibel(data.integers?.sqnr ?? steps[steps.length - 1]?.total_sqnr)],
    ["Passes", `${steps.length} in ${seconds(steps.reduce((sum, step) => sum + step.seconds, 0))}`],
  ];
  for (const [label, value] of rows) if (value) byId("summary").append(make("div", {}, make("dt", {}, label), make("dd", {}, value)));
  const backend = [metadata.backend, metadata.engine || metadata.flavor].filter((word) => typeof word === "string").join(", ");
  byId("subtitle").textContent = [recipe, backend && `on ${backend}`].filter(Boolean).join(" ");
}

function buildPasses() {
  for (let step = 0; step <= lastStep; step += 1) {
    const one = data.steps[step - 1];
    const counts = one ? KINDS.filter((kind) => one.changes[kind].length) : [];
    const bar = make("i");
    bar.style.width = `${share(one?.total_sqnr)}%`;
    byId("pass-list").append(make("li", {}, make("button", { type: "button", "data-step": step, onclick: () => { app.panel = "step"; app.go(step); } },
      make("div", { class: "row" }, make("span", { class: "number" }, String(step)), make("span", {}, stepTitle(step)),
        make("span", { class: "small" }, one ? seconds(one.seconds) : "")),
      one ? make("div", { class: "chips" }, counts.map((kind) => chip(kind, make("span", { title: kind }, `${SIGNS[kind]}${one.changes[kind].length}`, make("span", { class: "sr" }, ` ${kind} `)))),
        counts.length ? null : make("span", { class: "small" }, "no change"), make("span", { class: "space" }), make("span", { class: "small" }, decibel(one.total_sqnr))) : null,
      typeof (one?.total_sqnr ?? null) !== "object" ? make("div", { class: "meter" }, bar) : null)));
  }
}

function buildTabs() {
  byId("panels").append(make("div", { role: "tabpanel", id: "panel", tabindex: "-1" }));
  for (const [name, [title]] of Object.entries(PANELS)) {
    byId("tabs").append(make("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", onclick: () => app.open(name) }, title));
  }
  byId("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const names = Object.keys(PANELS);
    const name = names[(names.indexOf(app.panel) + step + names.length) % names.length];
    app.open(name);
    byId(`tab-${name}`).focus();
    event.preventDefault();
  });
}

function buildLegend() {
  const words = {
    changes: KINDS.map((kind) => [kind, `${SIGNS[kind]} ${kind}`]),
    roles: [["noted", "layer"], ["retuned", "quantizer"], ["rewired", "observer"]],
    coverage: [["added", "on integers"], ["noted", "folded"], ["rewired", "in float"]],
    values: [["added", "moved: 40 dB and more"], ["rewired", "20 to 40 dB"], ["removed", "below 20 dB"]],
  }[app.graph.paint];
  byId("legend").replaceChildren(...words.map(([kind, label]) => make("li", {}, chip(kind, label))));
}

// ---- search ----------------------------------------------------------------------------------

const search = { found: [], at: 0 };

function find(words) {
  const terms = words.toLowerCase().split(/\s+/).filter(Boolean);
  if (!terms.length) return [];
  const hay = (node) => `${data.names[node]} ${newest(node).path} ${newest(node).op}`.toLowerCase();
  const hits = data.names.map((_, node) => node).filter((node) => terms.every((term) => hay(node).includes(term)));
  const rank = (node) => (data.names[node].toLowerCase().startsWith(terms[0]) ? 0 : 1);
  return hits.sort((a, b) => rank(a) - rank(b) || a - b).slice(0, 50);
}

function newest(node) {
  return graphs[nearestStep(node, lastStep)].get(node);
}

function showResults() {
  const input = byId("search"), list = byId("results");
  list.hidden = !search.found.length;
  input.setAttribute("aria-expanded", String(!list.hidden));
  list.replaceChildren(...search.found.map((node, index) => make("li", {
    role: "option", id: `result-${index}`, "aria-selected": String(index === search.at),
    onpointerdown: (event) => { event.preventDefault(); choose(index); } }, data.names[node], " ", make("span", { class: "small" }, newest(node).op))));
  if (list.hidden) { input.removeAttribute("aria-activedescendant"); return; }
  input.setAttribute("aria-activedescendant", `result-${search.at}`);
  list.children[search.at]?.scrollIntoView({ block: "nearest" });
}

function choose(index) {
  const node = search.found[index];
  closeResults();
  if (node !== undefined) app.select(node, true);
}

function closeResults() {
  search.found = [];
  showResults();
}

function buildSearch() {
  const input = byId("search");
  input.addEventListener("input", () => {
    search.found = find(input.value);
    search.at = 0;
    showResults();
    if (input.value.trim()) app.say(plural(search.found.length, "node") + " found");
  });
  input.addEventListener("keydown", (event) => {
    const hop = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (hop && search.found.length) {
      search.at = (search.at + hop + search.found.length) % search.found.length;
      showResults();
    } else if (event.key === "Enter") choose(search.at);
    else if (event.key === "Escape") closeResults();
    else return;
    event.preventDefault();
  });
  input.addEventListener("blur", closeResults);
}

// ---- keys and buttons ------------------------------------------------------------------------

const KEYS = {
  ArrowLeft: () => app.go(app.step - 1),
  ArrowRight: () => app.go(app.step + 1),
  "/": () => { byId("search").focus(); byId("search").select(); },
};

const isChanged = (node) => changes[app.step].has(node);

const GRAPH_KEYS = {
  ArrowUp: () => app.select(app.graph.neighbour(-1) ?? null),
  ArrowDown: () => app.select(app.graph.neighbour(1) ?? null),
  n: () => app.select(app.graph.neighbour(1, isChanged) ?? undefined),
  p: () => app.select(app.graph.neighbour(-1, isChanged) ?? undefined),
  "+": () => app.graph.zoom(1.25), "=": () => app.graph.zoom(1.25), "-": () => app.graph.zoom(0.8),
  0: () => app.graph.fit(),
  Escape: () => app.select(null),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea, [role=tab]")) return;
  const inGraph = event.target.id === "graph" || event.target === document.body;
  const action = KEYS[event.key] || (inGraph && GRAPH_KEYS[event.key]);
  if (!action) return;
  event.preventDefault();
  action();
}

function buildControls() {
  byId("slider").max = lastStep;
  byId("slider").addEventListener("input", (event) => app.go(Number(event.target.value)));
  byId("previous").addEventListener("click", () => app.go(app.step - 1));
  byId("next").addEventListener("click", () => app.go(app.step + 1));
  byId("zoom-in").addEventListener("click", () => app.graph.zoom(1.25));
  byId("zoom-out").addEventListener("click", () => app.graph.zoom(0.8));
  byId("fit").addEventListener("click", () => app.graph.fit());
  byId("paint").addEventListener("change", (event) => { app.graph.paint = event.target.value; app.graph.draw(); buildLegend(); });
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => {
    readAddress();
    app.graph.selected = app.node;
    app.graph.show(app.step);
    if (app.node !== null && recordAt(app.step, app.node)) app.graph.reveal(app.node);
    app.refresh();
  });
}

function readAddress() {
  const place = new URLSearchParams(location.hash.slice(1));
  if (PANELS[place.get("panel")]) app.panel = place.get("panel");
  if (place.has("step")) app.step = Math.max(0, Math.min(lastStep, Number(place.get("step")) || 0));
  if (numberOf.has(place.get("node"))) app.node = numberOf.get(place.get("node"));
}

readAddress();
buildSummary();
buildPasses();
buildTabs();
buildSearch();
app.graph = new GraphView(byId("graph"), byId("map"), (node) => app.select(node));
buildControls();
buildLegend();
app.graph.resize();
app.graph.step = app.step;
app.graph.selected = app.node;
app.graph.arrange();
app.graph.fit();
app.refresh();
requestAnimationFrame(() => requestAnimationFrame(() => {
  document.documentElement.dataset.ready = Math.round(performance.now());
}));
window.fxq = app;
