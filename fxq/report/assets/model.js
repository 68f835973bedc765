// The record of the run, and questions about it. A step is 0 for the captured graph, else a pass.

const KINDS = ["added", "removed", "rewired", "noted", "retuned"];
const SIGNS = { added: "+", removed: "−", rewired: "~", noted: "!", retuned: "#" };
const data = JSON.parse(document.getElementById("data").textContent);
const lastStep = Math.max(0, data.graphs.length - 1);
const ledger = new Map((data.ledger || []).map((entry) => [entry.node, entry]));

const records = data.records.map(([node, op, inputs, args, value, facts, digest, path], index) => (
  { index, node, name: data.names[node], op, inputs, args, value, facts, digest, path }));

const graphs = data.graphs.map((list) => {
  const found = new Map();
  for (const index of list) found.set(records[index].node, records[index]);
  return found;
});

const changes = [new Map(), ...data.steps.map((step) => {
  const found = new Map();
  for (const kind of KINDS) for (const node of step.changes[kind]) found.set(node, kind);
  return found;
})];

// By step and node, how far the pass moved the value on the probe batch.
const moved = [new Map(), ...data.steps.map((step) => new Map(
  step.moved.map(([node, sqnr, largest]) => [node, { sqnr, largest }])))];

const readers = graphs.map((graph) => {
  const found = new Map();
  for (const record of graph.values()) {
    for (const input of record.inputs) {
      if (!found.has(input)) found.set(input, []);
      found.get(input).push(record.node);
    }
  }
  return found;
});

const routes = new Map(data.routes.map(([source, target, points]) => [`${source},${target}`, points]));
const numberOf = new Map(data.names.map((name, index) => [name, index]));

// What a step shows: its nodes, and those it removed.
function shown(step) {
  const found = [...(graphs[step] || new Map()).values()];
  for (const [node, kind] of changes[step] || []) {
    if (kind === "removed") found.push(graphs[step - 1].get(node));
  }
  return found;
}

function recordAt(step, node) {
  return graphs[step]?.get(node) || (changes[step]?.get(node) === "removed" && graphs[step - 1].get(node)) || null;
}

function stepsWith(node) {
  return graphs.map((_, step) => step).filter((step) => graphs[step].has(node));
}

function historyOf(node) {
  return changes.map((found, step) => [step, found.get(node)]).filter(([, kind]) => kind);
}

function nearestStep(node, step) {
  const steps = stepsWith(node);
  return steps.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best), steps[0] ?? step);
}

function stepTitle(step) {
  return step === 0 ? "capture" : data.steps[step - 1].name;
}

function text(record) {
  const operands = record.inputs.map((input) => `%${data.names[input]}`);
  if (record.args) operands.push(record.args);
  const facts = record.facts.length ? `  [${record.facts.join(", ")}]` : "";
  return `${record.op}${record.value ? `:${record.value}` : ""}(${operands.join(", ")})${facts}`;
}

function factOf(record, key) {
  const found = record.facts.find((word) => word.startsWith(`${key}=`));
  return found && found.slice(key.length + 1);
}

function roleOf(record) {
  if (/Observer$/.test(record.op)) return "observer";
  if (/Quantizer$|Levels$|FakeQuantize|Clip$/.test(record.op)) return "quantizer";
  if (/Conv|Linear/.test(record.op)) return "layer";
  return /^(Input|Output|Constant)$/.test(record.op) ? "end" : "other";
}

// The value whose statistics tell about a node: its own, or that of what it rounds.
function watched(record, step) {
  const observed = data.values.observed || {};
  const fused = factOf(record, "observes") || factOf(record, "fused_into");
  for (const name of [record.name, fused]) if (name && observed[name]) return name;
  if (roleOf(record) !== "quantizer") return null;
  let at = record;
  for (let hops = 0; at && at.inputs.length && hops < 12; hops += 1) {
    at = recordAt(step, at.inputs[0]);
    if (at && observed[at.name]) return at.name;
    if (at && at.inputs.length !== 1) return null;
  }
  return null;
}

// The quantizer that rounds a value: itself, or the first one below it.
function quantizerOf(record) {
  const known = data.values.quantizers || {};
  if (known[record.name]) return record.name;
  let wave = [record.node];
  for (let hops = 0; hops < 3; hops += 1) {
    wave = wave.flatMap((node) => readers[lastStep].get(node) || []);
    const names = wave.map((node) => data.names[node]);
    const found = names.find((name) => known[name]);
    if (found) return found;
    wave = wave.filter((node) => /relu/i.test(graphs[lastStep].get(node).op));
  }
  return null;
}

// ---- words -----------------------------------------------------------------------------------

function number(value, digits = 4) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  const short = Number.isInteger(value) ? value : Number(value.toPrecision(digits));
  return (short !== 0 && Math.abs(short) < 1e-4 ? short.toExponential() : String(short)).replaceAll("-", "−");
}

function decibel(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "number" ? `${value.toFixed(1)} dB` : value;
}

function seconds(value) {
  if (value < 0.01) return "< 0.01 s";
  return value < 100 ? `${value.toFixed(2)} s` : `${Math.round(value)} s`;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

// An element with attributes and children; text is never markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}
