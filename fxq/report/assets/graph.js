// The graph on a canvas: only what is visible is drawn, whatever the size of the network.

const PITCH = 54, TALL = 38, WIDE = 176;

class GraphView {
  constructor(canvas, map, onSelect) {
    this.canvas = canvas;
    this.map = map;
    this.onSelect = onSelect;
    this.view = { x: 0, y: 0, k: 1 };
    this.step = lastStep;
    this.selected = null;
    this.hovered = null;
    this.paint = "changes";
    this.pointers = new Map();
    this.colours = {};
    this.readColours();
    this.arrange();
    this.listen();
  }

  // ---- where things are ----------------------------------------------------------------------

  arrange() {
    this.nodes = shown(this.step).sort((a, b) => data.places[a.node][1] - data.places[b.node][1]
      || data.places[a.node][0] - data.places[b.node][0]);
    this.open = new Uint8Array(data.rows);
    for (const record of this.nodes) this.open[data.places[record.node][1]] = 1;
    this.tops = new Float64Array(data.rows + 1);
    for (let row = 0; row < data.rows; row += 1) this.tops[row + 1] = this.tops[row] + (this.open[row] ? PITCH : 0);
    const columns = this.nodes.map((record) => data.places[record.node][0]);
    this.left = (Math.min(0, ...columns) - 0.8) * WIDE;
    this.right = (Math.max(0, ...columns) + 0.8) * WIDE;
    this.edges = this.nodes.flatMap((record) => this.edgesOf(record));
  }

  edgesOf(record) {
    const gone = changes[this.step].get(record.node) === "removed";
    return record.inputs.filter((source) => recordAt(this.step, source)).map((source) => ({
      source, target: record.node, gone,
      points: this.path(source, record.node),
    }));
  }

  path(source, target) {
    const points = [[this.x(source), this.y(source) + TALL / 2]];
    for (const [column, row] of routes.get(`${source},${target}`) || []) {
      points.push([column * WIDE, this.tops[row]], [column * WIDE, this.tops[row + 1]]);
    }
    points.push([this.x(target), this.y(target) - TALL / 2]);
    return points;
  }

  x(node) { return data.places[node][0] * WIDE; }

  y(node) { return this.tops[data.places[node][1]] + PITCH / 2; }

  // The first place in `nodes` that is not above a height.
  firstBelow(height) {
    let low = 0, high = this.nodes.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.y(this.nodes[middle].node) < height) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  nodeAt(x, y) {
    const [atX, atY] = [(x - this.view.x) / this.view.k, (y - this.view.y) / this.view.k];
    for (let i = this.firstBelow(atY - PITCH); i < this.nodes.length; i += 1) {
      const { node } = this.nodes[i];
      if (this.y(node) > atY + PITCH) break;
      if (Math.abs(this.x(node) - atX) <= WIDE / 2 && Math.abs(this.y(node) - atY) <= TALL / 2) return node;
    }
    return null;
  }

  // ---- moving --------------------------------------------------------------------------------

  // What is looked at stays where it is on the screen.
  show(step) {
    const anchor = this.anchor();
    const before = anchor === null ? 0 : this.y(anchor);
    this.step = step;
    this.arrange();
    if (anchor !== null) {
      const now = this.tops[data.places[anchor][1]] + PITCH / 2;
      this.view.y += (before - now) * this.view.k;
    }
    this.keepInside();
    this.draw();
  }

  anchor() {
    const middle = (this.height / 2 - this.view.y) / this.view.k;
    const y = this.selected !== null && recordAt(this.step, this.selected) ? this.y(this.selected) : null;
    if (y !== null && Math.abs(y - middle) * this.view.k < this.height / 2) return this.selected;
    const place = Math.min(this.firstBelow(middle), this.nodes.length - 1);
    return place < 0 ? null : this.nodes[place].node;
  }

  fit() {
    const wide = this.right - this.left;
    this.view.k = Math.max(0.2, Math.min(1, this.width / wide));
    this.view.x = this.width / 2 - this.view.k * (this.left + this.right) / 2;
    this.view.y = 12;
    if (this.selected !== null) this.reveal(this.selected);
    this.draw();
  }

  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const k = Math.max(0.05, Math.min(2.5, this.view.k * factor));
    const ratio = k / this.view.k;
    this.view = { k, x: x - (x - this.view.x) * ratio, y: y - (y - this.view.y) * ratio };
    this.keepInside();
    this.draw();
  }

  pan(dx, dy) {
    this.view.x += dx;
    this.view.y += dy;
    this.keepInside();
    this.draw();
  }

  keepInside() {
    const margin = 60, { k } = this.view;
    this.view.x = Math.max(margin - this.right * k, Math.min(this.width - margin - this.left * k, this.view.x));
    this.view.y = Math.max(margin - this.tops[data.rows] * k, Math.min(this.height - margin, this.view.y));
  }

  reveal(node) {
    const { k } = this.view;
    const [x, y] = [this.x(node) * k + this.view.x, this.y(node) * k + this.view.y];
    if (y < 50 || y > this.height - 50) this.view.y += this.height / 2 - y;
    if (x < WIDE * k / 2 || x > this.width - WIDE * k / 2) this.view.x += this.width / 2 - x;
    this.draw();
  }

  neighbour(direction, wanted = () => true) {
    const start = this.nodes.findIndex((record) => record.node === this.selected);
    const count = this.nodes.length;
    for (let hop = 1; hop <= count; hop += 1) {
      const place = start < 0 && direction < 0 ? count - hop : start + direction * hop;
      const found = this.nodes[((place % count) + count) % count];
      if (wanted(found.node)) return found.node;
    }
    return null;
  }

  resize() {
    const box = this.canvas.parentElement.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    this.mapWidth = 64;
    this.height = Math.max(80, box.height);
    this.width = Math.max(80, box.width - this.mapWidth);
    for (const [canvas, width] of [[this.canvas, this.width], [this.map, this.mapWidth]]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(this.height * ratio);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${this.height}px`;
      canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    }
    this.ratio = ratio;
    this.draw();
  }

  // ---- drawing -------------------------------------------------------------------------------

  readColours() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["page", "card", "sunk", "line", "strong-line", "text", "quiet", "accent", "accent-tint", "edge",
      ...KINDS, ...KINDS.map((kind) => `${kind}-tint`)]) {
      this.colours[name] = style.getPropertyValue(`--${name}`).trim();
    }
    this.sans = style.getPropertyValue("--sans");
  }

  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => { this.pending = 0; this.paintAll(); });
  }

  paintAll() {
    const context = this.canvas.getContext("2d");
    const { x, y, k } = this.view;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    context.translate(x, y);
    context.scale(k, k);
    const top = -y / k, bottom = (this.height - y) / k;
    this.drawEdges(context, top, bottom);
    this.drawn = 0;
    for (let i = this.firstBelow(top - PITCH); i < this.nodes.length; i += 1) {
      if (this.y(this.nodes[i].node) > bottom + PITCH) break;
      this.drawNode(context, this.nodes[i]);
      this.drawn += 1;
    }
    this.drawMap();
  }

  drawEdges(context, top, bottom) {
    for (const edge of this.edges) {
      const { points } = edge;
      if (points[0][1] > bottom || points[points.length - 1][1] < top) continue;
      const near = edge.source === this.selected || edge.target === this.selected;
      context.strokeStyle = edge.gone ? this.colours.removed : near ? this.colours.accent : this.colours.edge;
      context.lineWidth = near ? 2 : 1.2;
      context.setLineDash(edge.gone ? [4, 4] : []);
      context.beginPath();
      context.moveTo(...points[0]);
      for (let i = 1; i < points.length; i += 1) {
        const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
        if (x0 === x1) context.lineTo(x1, y1);
        else context.bezierCurveTo(x0, (y0 + y1) / 2, x1, (y0 + y1) / 2, x1, y1);
      }
      context.stroke();
    }
    context.setLineDash([]);
  }

  drawNode(context, record) {
    const kind = changes[this.step].get(record.node);
    const [fill, stroke] = this.coloursOf(record, kind);
    const x = this.x(record.node) - WIDE / 2, y = this.y(record.node) - TALL / 2;
    context.beginPath();
    context.roundRect(x, y, WIDE, TALL, 7);
    context.fillStyle = fill;
    context.fill();
    context.strokeStyle = stroke;
    context.lineWidth = 1;
    context.setLineDash(kind === "removed" ? [4, 3] : []);
    context.stroke();
    context.setLineDash([]);
    if (record.node === this.selected || record.node === this.hovered) {
      context.strokeStyle = this.colours.accent;
      context.lineWidth = record.node === this.selected ? 3 : 1.5;
      context.stroke();
    }
    if (this.view.k > 0.36) this.drawText(context, record, kind, x, y);
  }

  drawText(context, record, kind, x, y) {
    const room = WIDE - 20 - (kind ? 14 : 0);
    context.fillStyle = kind === "removed" ? this.colours.quiet : this.colours.text;
    context.font = `550 12px ${this.sans}`;
    context.fillText(cut(context, record.name, room), x + 10, y + 16);
    context.fillStyle = this.colours.quiet;
    context.font = `10.5px ${this.sans}`;
    const shape = record.value.replace(/^\w+/, "");
    const left = WIDE - 20 - context.measureText(` ${shape}`).width;
    const operator = [`${record.op} ${record.args}`.trimEnd(), record.op].find((words) => context.measureText(words).width <= left);
    context.fillText(`${operator ?? ended(context, record.op, left)} ${shape}`, x + 10, y + 30);
    if (kind) {
      context.fillStyle = this.colours[kind];
      context.font = `700 13px ${this.sans}`;
      context.fillText(SIGNS[kind], x + WIDE - 17, y + 16);
    }
  }

  coloursOf(record, kind) {
    const named = (name) => [this.colours[`${name}-tint`], this.colours[name]];
    if (this.paint === "changes") return kind ? named(kind) : [this.colours.card, this.colours["strong-line"]];
    const key = KEYS_OF[this.paint](record, this.step);
    return key ? named(key) : [this.colours.card, this.colours["strong-line"]];
  }

  drawMap() {
    const context = this.map.getContext("2d");
    const total = this.tops[data.rows] || 1;
    const scale = this.mapScale = Math.min(this.height / total, 0.5);
    const across = Math.min(this.mapWidth / (this.right - this.left), 0.3);
    context.clearRect(0, 0, this.mapWidth, this.height);
    for (const record of this.nodes) {
      const kind = changes[this.step].get(record.node);
      const tinted = this.paint === "changes" ? kind && this.colours[kind] : this.coloursOf(record, kind)[1];
      context.fillStyle = tinted || this.colours["strong-line"];
      const x = this.mapWidth / 2 + (this.x(record.node) - (this.left + this.right) / 2) * across;
      context.fillRect(x - 9, this.y(record.node) * scale, 18, Math.max(1, TALL * scale * 0.8));
    }
    const top = -this.view.y / this.view.k * scale;
    context.strokeStyle = this.colours.accent;
    context.lineWidth = 1.5;
    context.strokeRect(2, top, this.mapWidth - 4, this.height / this.view.k * scale);
  }

  // ---- the hand ------------------------------------------------------------------------------

  listen() {
    const { canvas } = this;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const unit = event.deltaMode === 1 ? 18 : 1;
      if (event.ctrlKey || event.metaKey) this.zoom(Math.exp(-event.deltaY * unit / 240), event.offsetX, event.offsetY);
      else this.pan(-event.deltaX * unit, -event.deltaY * unit);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.release(event));
    canvas.addEventListener("dblclick", (event) => this.zoom(1.6, event.offsetX, event.offsetY));
    const jump = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      this.view.y = this.height / 2 - event.offsetY / this.mapScale * this.view.k;
      this.keepInside();
      this.draw();
    };
    this.map.addEventListener("pointerdown", jump);
    this.map.addEventListener("pointermove", jump);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.readColours(); this.draw(); });
    new ResizeObserver(() => this.resize()).observe(canvas.parentElement);
  }

  press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    this.moved = this.pointers.size > 1;
  }

  move(event) {
    const last = this.pointers.get(event.pointerId);
    const here = [event.offsetX, event.offsetY];
    if (!last) {
      const over = this.nodeAt(...here);
      if (over !== this.hovered) {
        this.hovered = over;
        this.canvas.classList.toggle("over", over !== null);
        this.draw();
      }
      return;
    }
    const [dx, dy] = [here[0] - last[0], here[1] - last[1]];
    if (!this.moved && Math.hypot(dx, dy) < 4) return;
    this.moved = true;
    this.canvas.classList.add("drag");
    const other = [...this.pointers].find(([id]) => id !== event.pointerId);
    this.pointers.set(event.pointerId, here);
    if (!other) { this.pan(dx, dy); return; }
    const [x, y] = other[1];
    this.zoom(Math.hypot(here[0] - x, here[1] - y) / Math.max(1, Math.hypot(last[0] - x, last[1] - y)), x, y);
  }

  release(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    this.canvas.classList.remove("drag");
    if (!this.moved && event.type === "pointerup") this.onSelect(this.nodeAt(event.offsetX, event.offsetY));
  }
}

const ROLE_COLOURS = { layer: "noted", quantizer: "retuned", observer: "rewired" };
const PLACE_COLOURS = { int8: "added", folded: "noted", float: "rewired" };

const KEYS_OF = {
  roles: (record) => ROLE_COLOURS[roleOf(record)],
  coverage: (record) => PLACE_COLOURS[placeOf(record)],
  values: (record, step) => moved[step].has(record.node) && moveColour(moved[step].get(record.node).sqnr),
};

function moveColour(sqnr) {
  if (typeof sqnr !== "number") return sqnr === "exact" ? "added" : "removed";
  return sqnr < 20 ? "removed" : sqnr < 40 ? "rewired" : "added";
}

function placeOf(record) {
  return ledger.get(record.name)?.where;
}

// The text as far as there is room, its end left out: an operator is known by its beginning.
function ended(context, words, room) {
  let keep = words.length;
  while (keep > 1 && context.measureText(`${words.slice(0, keep)}…`).width > room) keep -= 1;
  return `${words.slice(0, keep)}…`;
}

// The text as far as there is room, its middle left out: names differ at both ends.
function cut(context, words, room) {
  if (context.measureText(words).width <= room) return words;
  let keep = Math.max(4, Math.floor(words.length * room / context.measureText(words).width));
  for (; keep > 4; keep -= 1) {
    const half = keep >> 1;
    const short = `${words.slice(0, keep - half)}…${words.slice(words.length - half)}`;
    if (context.measureText(short).width <= room) return short;
  }
  return words.slice(0, 4);
}
