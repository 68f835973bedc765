// Small charts, as SVG: a histogram with its grid, ranges per channel, parts of a whole.

const CHART = { width: 340, height: 132, left: 4, right: 336, bottom: 100, top: 8 };

function shape(tag, attributes, words) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (words !== undefined) element.textContent = words;
  return element;
}

function chart(label, height, children) {
  const svg = shape("svg", { viewBox: `0 0 ${CHART.width} ${height}`, role: "img", "aria-label": label });
  svg.append(...children);
  return svg;
}

// Bins with the ends of the grid as dashed lines and its levels below; what is clipped is red, what a
// ReLU makes zero is grey.
function histogram(bins, grid, log, label) {
  const { start, width, counts } = bins;
  const ends = [start, start + width * counts.length];
  const marks = [grid.low, grid.high].filter((end) => typeof end === "number");
  const least = Math.min(ends[0], ...marks), most = Math.max(ends[1], ...marks);
  const x = (value) => CHART.left + (value - least) / (most - least || 1) * (CHART.right - CHART.left);
  const level = (count) => (log ? Math.log1p(count) : count);
  const tallest = level(Math.max(1, ...counts));
  const parts = counts.map((count, bin) => {
    const [from, to] = [x(start + bin * width), x(start + (bin + 1) * width)];
    const tall = level(count) / tallest * (CHART.bottom - CHART.top);
    const middle = start + (bin + 0.5) * width;
    const clipped = marks.length === 2 && (middle < grid.low || middle > grid.high);
    const look = grid.relu && middle < grid.low ? "zeroed" : clipped ? "outside" : "bar";
    return shape("rect", { class: look, x: from.toFixed(2), y: (CHART.bottom - tall).toFixed(2),
      width: Math.max(0.4, to - from - 0.6).toFixed(2), height: tall.toFixed(2) });
  });
  parts.push(shape("line", { class: "axis", x1: CHART.left, x2: CHART.right, y1: CHART.bottom, y2: CHART.bottom }));
  for (const mark of marks) {
    parts.push(shape("line", { class: "clip", x1: x(mark), x2: x(mark), y1: 2, y2: CHART.bottom + 9 }));
  }
  parts.push(...levelMarks(grid, x));
  for (const [value, anchor] of [[least, "start"], [most, "end"]]) {
    parts.push(shape("text", { x: x(value), y: 126, "text-anchor": anchor }, number(value, 3)));
  }
  if (least < 0 && most > 0 && x(0) > 40 && x(0) < 300) {
    parts.push(shape("text", { x: x(0), y: 126, "text-anchor": "middle" }, "0"));
  }
  return chart(label, CHART.height, parts);
}

function levelMarks(grid, x) {
  if (!grid.levels) return [];
  if (grid.levels.length > 70) {
    const [from, to] = [x(grid.levels[0]), x(grid.levels[grid.levels.length - 1])];
    return [shape("rect", { class: "band", x: from, y: CHART.bottom + 2, width: Math.max(1, to - from), height: 7 })];
  }
  return grid.levels.map((value) => shape("line",
    { class: "level", x1: x(value), x2: x(value), y1: CHART.bottom + 2, y2: CHART.bottom + 9 }));
}

// The share of values that a grid does not reach, from the bins whose middle is outside.
function outsideShare(bins, grid) {
  const total = bins.counts.reduce((sum, count) => sum + count, 0);
  const out = bins.counts.reduce((sum, count, bin) => {
    const middle = bins.start + (bin + 0.5) * bins.width;
    return sum + ((middle < grid.low && !grid.relu) || middle > grid.high ? count : 0);
  }, 0);
  return total ? out / total : 0;
}

// A bar from the low to the high of each channel, and the range its grid covers as a line above and below.
function channelChart(low, high, reach, label) {
  const all = [...low, ...high, ...(reach ? [...reach.low, ...reach.high] : [])].filter((value) => value !== null);
  const least = Math.min(0, ...all), most = Math.max(0, ...all);
  const y = (value) => CHART.bottom - (value - least) / (most - least || 1) * (CHART.bottom - CHART.top);
  const step = (CHART.right - CHART.left) / low.length;
  const bars = low.map((value, index) => `M${(CHART.left + (index + 0.5) * step).toFixed(2)} ${y(value).toFixed(2)}V${y(high[index]).toFixed(2)}`);
  const parts = [shape("path", { d: bars.join(""), stroke: "var(--accent)", "stroke-opacity": 0.65,
    "stroke-width": Math.max(0.5, Math.min(8, step * 0.7)).toFixed(2), fill: "none" })];
  parts.push(shape("line", { class: "axis", x1: CHART.left, x2: CHART.right, y1: y(0), y2: y(0) }));
  for (const ends of reach ? [reach.low, reach.high] : []) {
    const path = ends.map((value, index) => `${index ? "H" : "M"}${(CHART.left + index * step).toFixed(2)}${index ? "V" : " "}${y(value).toFixed(2)}H${(CHART.left + (index + 1) * step).toFixed(2)}`);
    parts.push(shape("path", { d: path.join(""), class: "clip", fill: "none" }));
  }
  parts.push(shape("text", { x: CHART.left, y: 118 }, "channel 0"));
  parts.push(shape("text", { x: CHART.right, y: 118, "text-anchor": "end" }, String(low.length - 1)));
  parts.push(shape("text", { x: CHART.width / 2, y: 118, "text-anchor": "middle" }, `${number(least, 3)} to ${number(most, 3)}`));
  return chart(label, 122, parts);
}

function bitsChart(bits, label) {
  const step = (CHART.right - CHART.left) / bits.length;
  const path = bits.map((value, index) => {
    const [x, y] = [(CHART.left + index * step).toFixed(2), (44 - value * 5).toFixed(1)];
    return `M${x} 44V${y}H${(CHART.left + (index + 1) * step).toFixed(2)}V44Z`;
  });
  return chart(label, 60, [shape("path", { class: "bar", d: path.join("") }),
    shape("text", { x: CHART.left, y: 56 }, `${Math.min(...bits)} to ${Math.max(...bits)} bits`)]);
}

// Named shares of a whole as one bar.
function splitBar(shares, className) {
  const total = shares.reduce((sum, [, value]) => sum + value, 0) || 1;
  return make("div", { class: className, role: "img", "aria-label": shares.map(([name, value]) => `${name} ${(100 * value / total).toFixed(0)} %`).join(", ") },
    shares.filter(([, value]) => value > 0).map(([name, value]) => {
      const part = make("span", { class: `part ${name}`, title: `${name} ${(100 * value / total).toFixed(1)} %` });
      part.style.flexGrow = value / total;
      return part;
    }));
}
