// The panels at the side: a node, a step, coverage, error, the recipe.

let logCounts = true;

function nodeLink(node, words) {
  const name = typeof node === "number" ? data.names[node] : node;
  return make("button", { type: "button", class: "link", onclick: () => app.select(numberOf.get(name), true) }, words || `%${name}`);
}

function chip(kind, words) {
  return make("span", { class: `chip ${kind}` }, words ?? `${SIGNS[kind]} ${kind}`);
}

function factList(rows) {
  const list = make("dl", { class: "facts" });
  for (const [label, value] of rows) {
    if (value === "" || value === null || value === undefined) continue;
    list.append(make("dt", {}, label), make("dd", {}, value));
  }
  return list;
}

// A list that shows its first entries, and the others when asked.
function longList(entries, build, most = 60) {
  const list = make("ul", { class: "items" }, entries.slice(0, most).map(build));
  if (entries.length <= most) return [list];
  const more = make("button", { type: "button", class: "more", onclick: () => {
    list.append(...entries.slice(most).map(build));
    more.remove();
  } }, `Show all ${entries.length}`);
  return [list, more];
}

// ---- node ------------------------------------------------------------------------------------

function nodePanel() {
  const record = app.node === null ? null : recordAt(app.step, app.node);
  if (app.node !== null && !record) return absentNode();
  if (!record) return [make("h2", {}, "No node selected"), make("p", { class: "quiet" }, "Click one in the graph, or search for it.")];
  const kind = changes[app.step].get(record.node);
  const entry = ledger.get(record.name);
  const users = readers[app.step].get(record.node) || [];
  return [
    make("h2", {}, record.name, " ", kind ? chip(kind) : null),
    make("p", { class: "quiet" }, `${record.op}${record.value ? ` ${record.value}` : ""}`),
    factList([
      ["path", record.path !== record.name ? record.path : ""],
      ["arguments", record.args],
      ["facts", record.facts.join(", ")],
      ["reads", record.inputs.map((input) => nodeLink(input))],
      ["read by", users.map((user) => nodeLink(user))],
      ["parameters", record.digest ? make("span", { class: "mono" }, `#${record.digest}`) : ""],
      ["runs", entry ? placeText(entry) : ""],
    ]),
    ...refusals(record.name),
    ...attributionOf(record.name),
    ...weightSection(record),
    ...valueSection(record),
    ...movedSection(record),
    ...historySection(record),
  ];
}

function absentNode() {
  const steps = stepsWith(app.node);
  return [make("h2", {}, data.names[app.node]),
    make("p", { class: "quiet" }, `This node is in the graph from step ${steps[0]} to ${steps[steps.length - 1]}.`),
    make("button", { type: "button", class: "more", onclick: () => app.select(app.node, true) }, "Go there")];
}

function placeText(entry) {
  const where = { int8: "on integers", folded: "inside another kernel", float: "in float" }[entry.where] || entry.where;
  return entry.why ? `${where}: ${entry.why}` : where;
}

function refusals(name) {
  const found = data.steps.flatMap((step) => step.misses.filter((miss) => miss[1] === name).map((miss) => [step.name, miss[2]]));
  return found.map(([pass, why]) => make("p", { class: "note" }, `${pass}: ${why}`));
}

function attributionOf(name) {
  const found = (data.attribution.layers || []).find((layer) => layer.node === name);
  if (!found) return [];
  const causes = errorCauses(found);
  return [make("h3", {}, "Error by cause"), splitBar(causes, "split"),
    factList(causes.map(([cause, value]) => [cause, number(value, 3)]))];
}

function errorCauses(layer) {
  return ["weight", "rounding", "clipping"].filter((cause) => typeof layer[cause] === "number").map((cause) => [cause, Math.max(0, layer[cause])]);
}

function weightSection(record) {
  const layer = data.values.layers?.[record.name];
  if (!layer) return [];
  const levels = layer.levels || null;
  const parts = [make("h3", {}, "Weights"), factList([
    ["bits", Array.isArray(layer.bits) ? `${Math.min(...layer.bits)} to ${Math.max(...layer.bits)}` : layer.bits],
    ["scale", spread(layer.scale)],
    ["range", `${number(Math.min(...layer.low))} to ${number(Math.max(...layer.high))}`],
    ["channels", layer.low.length],
    ["codes in use", levels ? levels.length : ""],
  ])];
  const top = levels ? [levels[0], levels[levels.length - 1]] : [-127, 127];
  if (layer.counts) {
    parts.push(...chartWithToggle((log) => histogram(layer, { low: top[0], high: top[1], levels }, log,
      `Histogram of the weights of ${record.name} in units of their scale`), "in units of each channel's scale"));
  }
  const reach = { low: layer.scale.map((scale) => scale * top[0]), high: layer.scale.map((scale) => scale * top[1]) };
  parts.push(make("p", { class: "small" }, "range of each output channel; dashed, what its grid covers"),
    channelChart(layer.low, layer.high, reach, `Weight ranges of ${layer.low.length} channels of ${record.name}`));
  if (Array.isArray(layer.bits)) parts.push(bitsChart(layer.bits, `Bits per channel of ${record.name}`));
  return parts;
}

function spread(values) {
  if (!Array.isArray(values)) return number(values);
  return `${number(Math.min(...values))} to ${number(Math.max(...values))} over ${values.length} channels`;
}

function valueSection(record) {
  const name = watched(record, app.step);
  const seen = name && data.values.observed[name];
  const rounds = quantizerOf(record);
  const spec = rounds && data.values.quantizers[rounds];
  if (!seen && !spec) return [];
  const parts = [make("h3", {}, name && name !== record.name ? `Value of %${name}` : "Value")];
  const before = name && newest(numberOf.get(name));
  const grid = spec ? { ...gridOf(spec), relu: spec.low === 0 && before && Boolean(factOf(before, "fused_relu")) } : {};
  const single = spec && !Array.isArray(spec.scale);
  parts.push(factList([
    ["rounded by", rounds && rounds !== record.name ? nodeLink(rounds) : ""],
    ["bits", spec ? (Array.isArray(spec.bits) ? `${Math.min(...spec.bits)} to ${Math.max(...spec.bits)}` : spec.bits) : ""],
    ["scale", spec ? spread(spec.scale) : ""],
    ["zero point", spec ? (single ? spec.zero_point : spread(spec.zero_point)) : ""],
    ["clips at", single ? `${number(spec.low)} and ${number(spec.high)}` : ""],
    ["levels", single ? grid.levels.length : ""],
    ["seen", seen ? `${number(seen.low)} to ${number(seen.high)}` : ""],
    ["calibrated on", seen ? `${seen.count.toLocaleString("en")} values in ${plural(seen.batches, "batch").replace("batchs", "batches")}` : ""],
    ["clipped", seen?.counts && single ? `about ${(100 * outsideShare(seen, grid)).toFixed(2)} % of values` : ""],
  ]));
  if (seen?.counts) parts.push(...chartWithToggle((log) => histogram(seen, single ? grid : {}, log, `Histogram of ${name}`),
    single ? `dashed, where values are clipped; below, the levels${grid.relu ? "; grey, what the ReLU makes zero" : ""}` : ""));
  if (seen?.channels) {
    const reach = spec && !single && spec.low.length === seen.channels.low.length ? spec : null;
    parts.push(channelChart(seen.channels.low, seen.channels.high, reach, `Ranges of ${seen.channels.low.length} channels of ${name}`));
  }
  if (spec && Array.isArray(spec.bits)) parts.push(bitsChart(spec.bits, `Bits per channel of ${rounds}`));
  return parts;
}

function gridOf(spec) {
  if (Array.isArray(spec.scale)) return {};
  const codes = spec.levels || Array.from({ length: 2 ** spec.bits }, (_, code) => code - spec.zero_point);
  return { low: spec.low, high: spec.high, levels: codes.map((code) => code * spec.scale) };
}

function chartWithToggle(draw, caption) {
  const place = make("div", {}, draw(logCounts));
  const box = make("input", { type: "checkbox", class: "log", onchange: () => {
    logCounts = box.checked;
    place.replaceChildren(draw(logCounts));
  } });
  box.checked = logCounts;
  return [place, make("div", { class: "row" }, make("span", { class: "small" }, caption), make("label", { class: "toggle" }, box, "log counts"))];
}

function movedSection(record) {
  const found = moved.map((values, step) => [step, values.get(record.node)]).filter(([, one]) => one);
  if (!found.length) return [];
  return [make("h3", {}, "Moved by"), make("p", { class: "small" }, "SQNR of its value on the probe batch against that before the pass; largest difference."),
    make("ul", { class: "items moved" }, found.map(([step, one]) => meterRow(`${step} ${stepTitle(step)}`, one, () => app.go(step))))];
}

function historySection(record) {
  const found = historyOf(record.node);
  if (!found.length) return [];
  return [make("h3", {}, "History"), make("ul", { class: "items" }, found.map(([step, kind]) => make("li", {},
    make("div", { class: "row" }, chip(kind), make("button", { type: "button", class: "link", onclick: () => app.go(step) }, `${step} ${stepTitle(step)}`), make("span")),
    ...changeText(step, record.node, kind))))];
}

function changeText(step, node, kind) {
  const [before, after] = [graphs[step - 1].get(node), graphs[step].get(node)];
  if (kind === "added") return [make("div", { class: "mono" }, text(after))];
  if (kind === "removed") return [make("div", { class: "mono" }, text(before))];
  if (kind === "retuned") return [make("div", { class: "mono" }, `#${before.digest} → #${after.digest}`)];
  return [make("div", { class: "mono" }, text(after)), make("div", { class: "mono" }, `was ${text(before)}`)];
}

// ---- step ------------------------------------------------------------------------------------

function stepPanel() {
  if (app.step === 0) {
    const count = graphs[0]?.size || 0;
    return [make("h2", {}, "capture"), make("p", { class: "quiet" }, `The network as it was captured: ${plural(count, "node")}.`)];
  }
  const step = data.steps[app.step - 1];
  const parts = [
    make("h2", {}, `${app.step} ${step.name}`),
    factList([
      ["promises", step.contract],
      ["time", seconds(step.seconds)],
      ["SQNR of this step", decibel(step.sqnr)],
      ["SQNR since capture", decibel(step.total_sqnr)],
      ["largest difference", step.drift ? number(step.drift.largest, 3) : ""],
      ["argmax flips", step.drift?.decisions ? `${step.drift.flips} of ${step.drift.decisions}` : ""],
    ]),
    ...step.notes.map((note) => make("p", { class: "note" }, note)),
  ];
  const options = Object.entries(step.options);
  if (options.length) parts.push(make("details", {}, make("summary", {}, plural(options.length, "option")),
    factList(options.map(([key, value]) => [key, typeof value === "object" ? JSON.stringify(value) : String(value)]))));
  for (const kind of KINDS.filter((one) => step.changes[one].length)) {
    const nodes = step.changes[kind];
    parts.push(make("details", { open: true }, make("summary", {}, chip(kind, `${SIGNS[kind]} ${nodes.length} ${kind}`)),
      ...longList(nodes, (node) => make("li", {}, nodeLink(node), ...changeText(app.step, node, kind)), 24)));
  }
  const values = [...moved[app.step]].sort(([, a], [, b]) => share(a.sqnr) - share(b.sqnr));
  if (values.length) parts.push(make("details", {}, make("summary", {}, `${plural(values.length, "value")} moved`),
    make("p", { class: "small" }, "SQNR on the probe batch against the value before; largest difference."),
    ...longList(values, ([node, one]) => meterRow(`%${data.names[node]}`, one, () => app.select(node, true)), 24)));
  if (step.misses.length) parts.push(make("details", {}, make("summary", {}, `${step.misses.length} refused`),
    ...longList(step.misses, ([node, name, why]) => make("li", {}, node === null ? `%${name}` : nodeLink(node), make("div", { class: "small" }, why)))));
  return parts;
}

// ---- coverage, error, recipe -----------------------------------------------------------------

let coverageFilter = "all";

function coveragePanel() {
  if (!data.ledger) return [make("h2", {}, "Coverage"), make("p", { class: "quiet" }, "This run was not lowered, so it has no ledger.")];
  const places = ["int8", "folded", "float"].map((place) => [place, data.ledger.filter((entry) => entry.where === place).length]);
  const layers = data.ledger.filter((entry) => entry.layer);
  const inside = layers.filter((entry) => entry.where === "int8").length;
  const chosen = data.ledger.filter((entry) => coverageFilter === "all" || entry.where === coverageFilter);
  const filters = [["all", data.ledger.length], ...places].map(([place, count]) => make("button", {
    type: "button", "aria-pressed": String(place === coverageFilter), "data-place": place,
    onclick: () => { coverageFilter = place; app.showPanel(); document.querySelector(`[data-place=${place}]`).focus(); } }, `${place} ${count}`));
  return [make("h2", {}, "Coverage"),
    make("p", { class: "quiet" }, `${inside} of ${plural(layers.length, "layer")} run on integers.`),
    splitBar(places, "parts"), make("div", { class: "filters", role: "group", "aria-label": "Show" }, filters),
    ...longList(chosen, (entry) => make("li", {},
      make("div", { class: "row" }, numberOf.has(entry.node) ? nodeLink(entry.node) : `%${entry.node}`, make("span", { class: "small" }, `${entry.op} · ${entry.where}`)),
      entry.why ? make("div", { class: "small" }, entry.why) : null), 120)];
}

function errorPanel() {
  const parts = [make("h2", {}, "Error"), ...waterfall()];
  const ranked = data.sensitivity || [];
  if (ranked.length) parts.push(make("h3", {}, "Sensitivity"), make("p", { class: "small" }, "SQNR of the output with this layer alone quantized; in brackets, with all but this one."),
    ...longList(ranked, (layer) => sensitivityRow(layer), 40));
  const layers = (data.attribution.layers || []).map((layer) => [layer.node, errorCauses(layer)]);
  const total = (causes) => causes.reduce((sum, [, value]) => sum + value, 0);
  layers.sort((a, b) => total(b[1]) - total(a[1]));
  if (layers.length) parts.push(make("h3", {}, "Error by layer and cause"), make("p", { class: "small" },
    chip("added", "weight"), " ", chip("noted", "rounding"), " ", chip("rewired", "clipping")),
  ...longList(layers, ([name, causes]) => make("li", {}, make("div", { class: "row" }, numberOf.has(name) ? nodeLink(name) : name, make("span", { class: "small" }, number(total(causes), 3))), splitBar(causes, "split")), 40));
  return parts;
}

// From the captured network to the integers: what each step added to the error of the output, or took away.
function waterfall() {
  const measured = data.steps.map((step, index) => [`${index + 1} ${step.name}`, step.total_sqnr, () => app.go(index + 1)]).filter(([, sqnr]) => sqnr !== null);
  if (data.integers) measured.push(["integers", data.integers.sqnr]);
  if (!measured.length) return [make("p", { class: "quiet" }, "It was not measured.")];
  const errors = [0, ...measured.map(([, sqnr]) => relativeError(sqnr))];
  const top = Math.max(...errors.filter(Number.isFinite)) || 1;
  return [make("p", { class: "quiet" }, "Signal-to-noise ratio of the output on the probe batch, against the captured network; then what the step added to the squared error, in units of the output's. The parts add up to ",
    make("span", { id: "error-sum" }, number(errors[errors.length - 1], 3)), "."),
  make("ul", { class: "items" }, measured.map(([name, sqnr, onclick], place) => fallRow(name, sqnr, errors[place], errors[place + 1], top, onclick)))];
}

function relativeError(sqnr) {
  if (typeof sqnr !== "number") return sqnr === "exact" ? 0 : Infinity;
  return 10 ** (-sqnr / 10);
}

function fallRow(name, sqnr, before, after, top, onclick) {
  const part = before === after ? 0 : after - before;
  const bar = make("i", { class: part > 0 ? "grew" : "shrank" });
  const [from, to] = [Math.min(before, after, top), Math.min(Math.max(before, after), top)];
  bar.style.left = `${from / top * 98}%`;
  bar.style.width = `${(to - from) / top * 98}%`;
  return make("li", { class: "fall", "data-part": part }, make("div", { class: "row" }, onclick ? make("button", { type: "button", class: "link", onclick }, name) : make("span", { class: "plain" }, name),
    make("span", { class: "small" }, `${decibel(sqnr)} · ${part > 0 ? "+" : ""}${number(part, 3)}`)), make("div", { class: "drop" }, part ? bar : null));
}

function sensitivityRow(layer) {
  const bar = make("i");
  bar.style.width = `${share(layer.alone)}%`;
  return make("li", { class: "sensitivity" }, make("div", { class: "row" }, numberOf.has(layer.node) ? nodeLink(layer.node) : layer.node,
    make("span", { class: "small" }, `${decibel(layer.alone)} (${decibel(layer.without)})`)), make("div", { class: "meter" }, bar));
}

function meterRow(name, drift, onclick) {
  const bar = make("i");
  bar.style.width = `${share(drift.sqnr)}%`;
  const words = [decibel(drift.sqnr), number(drift.largest, 3)].filter(Boolean).join(" · ");
  return make("li", {}, make("div", { class: "row" }, onclick ? make("button", { type: "button", class: "link", onclick }, name) : make("span", { class: "plain" }, name),
    make("span", { class: "small" }, words)), make("div", { class: "meter" }, bar));
}

// Of a ratio, as a part of 60 dB, above which an 8-bit network has nothing left to lose.
function share(value) {
  if (value === "exact") return 100;
  return typeof value === "number" ? Math.max(0, Math.min(100, value / 60 * 100)) : 0;
}

function recipePanel() {
  if (!data.recipe) return [make("h2", {}, "Recipe"), make("p", { class: "quiet" }, "The run holds no recipe.")];
  return [make("h2", {}, "Recipe"), make("pre", { tabindex: "0", "aria-label": "Recipe as TOML" }, data.recipe)];
}

const PANELS = { node: ["Node", nodePanel], step: ["Step", stepPanel], coverage: ["Coverage", coveragePanel],
  error: ["Error", errorPanel], recipe: ["Recipe", recipePanel] };
