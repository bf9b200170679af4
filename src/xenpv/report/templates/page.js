"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart");
  const told = document.getElementById("place");
  const SVG = "http://www.w3.org/2000/svg";
  const LANES = [["pages", "Memory"], ["tables", "Page tables"], ["p2m", "p2m"], ["content", "Zero and duplicate"]];
  const SEVERITIES = ["error", "warning", "note"];
  const lanes = LANES.map(([id, title]) => ({id, title, layers: data.layers.filter(layer => layer.lane === id)}))
    .filter(lane => lane.layers.length);
  const corners = data.axis;  // [pfn, place from 0 to 1], ascending
  const END = data.end;
  let view = [0, 1];  // the part of the line that is seen
  let chosen = null;  // [first pfn, last pfn]
  let width = 0;

  // --- between pfns and places on the line ----------------------------------------------------------------------
  function corner(value, column) {  // the last corner that is not beyond the value, but never the last of all
    let low = 0, high = corners.length - 2;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (corners[middle][column] <= value) low = middle; else high = middle - 1;
    }
    return low;
  }
  function across(value, from, to) {
    const i = corner(value, from), a = corners[i], b = corners[i + 1];
    return b[from] === a[from] ? a[to] : a[to] + (b[to] - a[to]) * (value - a[from]) / (b[from] - a[from]);
  }
  const placeOf = pfn => across(Math.min(pfn, END), 0, 1);
  const pfnOf = place => Math.max(0, Math.min(END - 1, Math.floor(across(place, 1, 0))));
  const xOf = pfn => (placeOf(pfn) - view[0]) / (view[1] - view[0]) * width;
  const pfnAt = x => pfnOf(view[0] + x / width * (view[1] - view[0]));

  // --- words ------------------------------------------------------------------------------------------------------
  const hex = n => "0x" + n.toString(16);
  function size(pages) {
    let n = pages * 4, units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    while (n >= 1024 && units.length > 1) { n /= 1024; units.shift(); }
    return (Number.isInteger(n) ? n : n.toFixed(1)) + " " + units[0];
  }

  // --- drawing ----------------------------------------------------------------------------------------------------
  function make(parent, name, attributes, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }
  // The first row that ends after a pfn.
  function rowBehind(rows, pfn) {
    let low = 0, high = rows.length / 3;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (rows[middle * 3] + rows[middle * 3 + 1] <= pfn) low = middle + 1; else high = middle;
    }
    return low;
  }
  // A layer's rows from first to last as one path: what falls into the same pixels is one bar, as high as it is full,
  // and never too low or too narrow to be seen.
  function path(rows, at, [first, last], top, height) {
    let out = "", bar = null;
    const put = ({x, to, pages, start, end}) => {
      const tall = Math.max(Math.min(1, pages / (end - start)), .22) * height;
      out += `M${x.toFixed(2)} ${(top + height).toFixed(2)}v${(-tall).toFixed(2)}H${to.toFixed(2)}v${tall.toFixed(2)}z`;
    };
    for (let i = rowBehind(rows, first) * 3; i < rows.length && rows[i] <= last; i += 3) {
      const [start, span, pages] = [rows[i], rows[i + 1], rows[i + 2]];
      const x = Math.max(at(start), -2), to = Math.max(Math.min(at(start + span), width + 2), x + 1.5);
      if (bar && x < bar.to - .6 && to < bar.to + .6) {
        bar.pages += pages;
        bar.end = start + span;
        continue;
      }
      if (bar) put(bar);
      bar = {x: bar ? Math.max(x, bar.to) : x, to: bar ? Math.max(to, bar.to + .6) : to, pages, start, end: start + span};
    }
    if (bar) put(bar);
    return out;
  }
  const everywhere = [0, END], seen = () => [pfnAt(0), pfnAt(width)];
  const overall = pfn => placeOf(pfn) * width;

  function draw() {
    width = chart.clientWidth;
    if (!width) return;
    const lane = 26, label = 17, over = 22;
    const spots = [["Findings", findingSpots()], ["Parts to play", roleSpots()]].filter(([, all]) => all.length);
    const top = over + (gaps.includes(true) ? 42 : 30), height = top + spots.length * (label + 18) + lanes.length * (label + lane) + 10;
    chart.replaceChildren();
    const svg = make(chart, "svg", {viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true"});
    const hatch = make(make(svg, "defs", {}), "pattern", {id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse",
      patternTransform: "rotate(45)"});
    make(hatch, "path", {d: "M0 0V6", class: "hatching"});
    // All of it, and which part is seen.
    make(svg, "rect", {class: "base", width, height: over});
    for (const one of lanes.filter(one => one.id === "pages" || one.id === "tables"))
      for (const layer of one.layers) make(svg, "path", {class: "k-" + layer.kind, d: path(layer.rows, overall, everywhere, 0, over)});
    make(svg, "rect", {class: "window", x: view[0] * width + .5, width: Math.max((view[1] - view[0]) * width - 1, 2), y: .5, height: over - 1});
    gridAndTicks(svg, over + 17, top, height);
    let y = top;
    for (const [title, all] of spots) {
      make(svg, "text", {class: "lane", x: 8, y: y + 12}, title);
      drawSpots(svg, all, y + label + 8);
      y += label + 18;
    }
    for (const one of lanes) {
      make(svg, "text", {class: "lane", x: 8, y: y + 12}, one.title);
      make(svg, "rect", {class: "base", x: 0, y: y + label, width, height: lane - 4});
      for (const layer of one.layers)
        make(svg, "path", {class: "k-" + layer.kind, d: path(layer.rows, xOf, seen(), y + label, lane - 4)});
      y += label + lane;
    }
    if (chosen) {
      const a = xOf(chosen[0]), b = Math.max(xOf(chosen[1] + 1), a + 1.5);
      make(svg, "rect", {class: "chosen", x: a, y: over + 22, width: b - a, height});
      make(svg, "path", {class: "chosen-line", d: `M${a} ${over + 22}V${height}`});
    }
  }
  function gridAndTicks(svg, y, top, height) {
    let free = 4, freeBelow = 4;
    for (let i = 0; i + 1 < corners.length; i++) {
      const [first] = corners[i], [end] = corners[i + 1];
      const a = xOf(first), b = xOf(end);
      if (b < 0 || a > width) continue;
      if (gaps[i]) {
        make(svg, "rect", {class: "gap", x: a, y: top - 6, width: Math.max(b - a, 1), height});
        const text = size(end - first), half = text.length * 3;
        const middle = Math.max(half + 2, Math.min((Math.max(a, 0) + Math.min(b, width)) / 2, width - half - 2));
        if (middle - half > freeBelow) {
          make(svg, "text", {class: "break", x: middle, y: y + 13}, text);
          freeBelow = middle + half + 6;
        }
        continue;
      }
      const step = 2 ** Math.max(0, Math.ceil(Math.log2((end - first) * 96 / Math.max(b - a, .001))));
      const from = Math.max(first, pfnAt(Math.max(0, a)));
      for (let pfn = a >= 0 ? first : Math.ceil(from / step) * step, n = 0; pfn < end && n < 40; n++) {
        const x = xOf(pfn);
        if (x > width) break;
        const text = hex(pfn), wide = text.length * 6.5;
        if (x >= free - 4 && x + wide < width) {
          make(svg, "path", {class: "grid", d: `M${x.toFixed(1)} ${y + 4}V${height}`});
          make(svg, "text", {class: "tick", x: x + 3, y}, text);
          free = x + wide + 14;
        }
        pfn = (Math.floor(pfn / step) + 1) * step;
      }
    }
  }
  // What of the axis no page lies in, and no finding names.
  const gaps = corners.slice(1).map(([end], i) => {
    const first = corners[i][0];
    const there = layer => rowBehind(layer.rows, first) * 3 < layer.rows.length && layer.rows[rowBehind(layer.rows, first) * 3] < end;
    return !data.layers.some(there) && !data.findings.some(f => f.pfn >= first && f.pfn < end);
  });

  // --- marks: findings, and pages with a part to play ----------------------------------------------------------------
  function clustered(all) {  // of those at one place the worst, and how many
    const out = new Map();
    for (const one of all) {
      const x = xOf(one.pfn + .5);
      if (x < -8 || x > width + 8) continue;
      const key = Math.round(x / 9), held = out.get(key);
      if (!held) out.set(key, {...one, x, many: 1});
      else {
        held.many++;
        if (SEVERITIES.indexOf(one.style) < SEVERITIES.indexOf(held.style)) Object.assign(held, one, {x});
      }
    }
    return [...out.values()];
  }
  const findingSpots = () => clustered(data.findings.map(f => ({pfn: f.pfn, style: f.severity, title: f.message})));
  const roleSpots = () => clustered(data.places.map(p => ({pfn: p.pfn, style: "role", title: p.what})));
  function drawSpots(svg, all, y) {
    for (const spot of all) {
      const shape = spot.style === "role" ? `M${spot.x} ${y + 6}l-5 -9h10z` : `M${spot.x} ${y - 6}l6 6l-6 6l-6 -6z`;
      const on = chosen && spot.pfn >= chosen[0] && spot.pfn <= chosen[1] ? " on" : "";
      const mark = make(svg, "path", {class: `spot ${spot.style}${on}`, d: shape, "data-pfn": spot.pfn});
      make(mark, "title", {}, `${hex(spot.pfn)}: ${spot.title}` + (spot.many > 1 ? ` (and ${spot.many - 1} more here)` : ""));
    }
  }

  // --- what is chosen ---------------------------------------------------------------------------------------------
  function kindsAt(pfn) {
    const out = [];
    for (const layer of data.layers) {
      const i = rowBehind(layer.rows, pfn) * 3, [start, span, pages] = layer.rows.slice(i, i + 3);
      if (i === layer.rows.length || pfn < start) continue;
      out.push(layer.what + (pages < span ? ` (${Math.round(100 * pages / span)} % of the pfns around)` : ""));
    }
    return out;
  }
  function choose(first, last, {move = false, scroll = false} = {}) {
    chosen = [first, last];
    if (move) bringIntoView();
    draw();
    const roles = data.places.filter(p => p.pfn >= first && p.pfn <= last);
    const hits = [...document.querySelectorAll("[data-finding]")].filter(row => {
      const on = Number(row.dataset.finding) >= first && Number(row.dataset.finding) <= last;
      row.classList.toggle("hit", on);
      return on;
    });
    told.replaceChildren();
    const pfns = document.createElement("b");
    pfns.textContent = first === last ? `pfn ${hex(first)}` : `pfns ${hex(first)} to ${hex(last)}`;
    const words = first === last ? [`address ${"0x" + (BigInt(first) * 4096n).toString(16)}`, ...kindsAt(first)] : [size(last - first + 1)];
    if (first === last && words.length === 1) words.push("no page");
    words.push(...new Set(roles.slice(0, 6).map(p => p.what)));
    if (hits.length) words.push(hits.length === 1 ? "1 finding" : `${hits.length} findings`);
    told.append(pfns, " · " + words.join(" · "));
    if (hits.length && scroll) {
      hits[0].closest("details").open = true;
      hits[0].scrollIntoView({block: "nearest"});
    }
  }
  function bringIntoView() {
    const a = placeOf(chosen[0]), b = placeOf(chosen[1] + 1);
    const wide = Math.min(1, Math.max((b - a) * (chosen[0] === chosen[1] ? 64 : 1.4), least(a)));
    if (view[1] - view[0] <= wide * 4 && a >= view[0] && b <= view[1] && b - a >= (view[1] - view[0]) / 200) return;
    const middle = (a + b) / 2;
    look(middle - wide / 2, middle + wide / 2);
  }

  // --- moving about -------------------------------------------------------------------------------------------------
  function least(place) {  // the narrowest view: a few pfns
    const i = corner(Math.max(0, Math.min(1, place)), 1), a = corners[i], b = corners[i + 1];
    return Math.min(1, Math.max(1e-13, 12 * (b[1] - a[1]) / Math.max(1, b[0] - a[0])));
  }
  function look(a, b) {
    const wide = Math.min(1, Math.max(b - a, 1e-13));
    a = Math.max(0, Math.min(1 - wide, a));
    view = [a, a + wide];
  }
  function zoom(factor, x = width / 2) {
    const at = view[0] + x / width * (view[1] - view[0]);
    const wide = Math.max((view[1] - view[0]) * factor, Math.min(least(at), view[1] - view[0]));
    look(at - wide * x / width, at + wide * (1 - x / width));
    soon();
  }
  function pan(pixels) {
    const by = pixels / width * (view[1] - view[0]);
    look(view[0] + by, view[1] + by);
    soon();
  }
  let waiting = false;
  function soon() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }
  const at = event => event.clientX - chart.getBoundingClientRect().left;

  chart.addEventListener("wheel", event => {
    if (event.ctrlKey || event.metaKey) zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * .01), at(event));
    else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan(event.deltaX);
    else return;
    event.preventDefault();
  }, {passive: false});
  chart.addEventListener("keydown", event => {
    const does = {ArrowLeft: () => pan(-width / 8), ArrowRight: () => pan(width / 8), "+": () => zoom(.5), "=": () => zoom(.5),
      "-": () => zoom(2), "0": () => { look(0, 1); soon(); }}[event.key];
    if (!does || event.ctrlKey || event.metaKey || event.altKey) return;
    does();
    event.preventDefault();
  });
  const fingers = new Map();
  let moved = 0, pinch = 0, brushing = false;
  chart.addEventListener("pointerdown", event => {
    fingers.set(event.pointerId, event.clientX);
    if (fingers.size === 1) moved = 0;
    brushing = event.clientY - chart.getBoundingClientRect().top < 24;
    pinch = 0;
  });
  addEventListener("pointermove", event => {
    if (!fingers.has(event.pointerId)) return;
    const by = event.clientX - fingers.get(event.pointerId);
    fingers.set(event.pointerId, event.clientX);
    moved += Math.abs(by);
    if (moved < 4) return;
    chart.classList.add("moving");
    if (fingers.size === 2) {
      const [a, b] = [...fingers.values()], apart = Math.max(Math.abs(a - b), 10);
      if (pinch) zoom(pinch / apart, (a + b) / 2 - chart.getBoundingClientRect().left);
      pinch = apart;
    } else if (brushing) pan(by / (view[1] - view[0]));
    else pan(-by);
  });
  for (const name of ["pointerup", "pointercancel"]) addEventListener(name, event => {
    fingers.delete(event.pointerId);
    if (!fingers.size) chart.classList.remove("moving");
  });
  chart.addEventListener("click", event => {
    if (moved >= 4) return;
    const spot = event.target.closest("[data-pfn]");
    if (spot) return;  // the listener below has it
    if (brushing) {
      const place = at(event) / width, half = (view[1] - view[0]) / 2;
      look(place - half, place + half);
      return soon();
    }
    const pfn = pfnAt(at(event));
    choose(pfn, pfn, {scroll: true});
  });
  chart.addEventListener("dblclick", event => { if (!brushing) zoom(.25, at(event)); });
  document.getElementById("zoom-in").addEventListener("click", () => zoom(.5));
  document.getElementById("zoom-out").addEventListener("click", () => zoom(2));
  document.getElementById("zoom-all").addEventListener("click", () => { look(0, 1); soon(); });

  // Whatever names a pfn shows it on the map.
  function follow(target) {
    const named = target.closest("[data-pfn]");
    if (!named) return false;
    const first = Number(named.dataset.pfn), onMap = chart.contains(named);
    choose(first, Number(named.dataset.last ?? first), {move: !onMap, scroll: onMap});
    if (!onMap) chart.scrollIntoView({block: "nearest"});
    return true;
  }
  document.addEventListener("click", event => { if (moved < 4 || !chart.contains(event.target)) follow(event.target); });
  document.addEventListener("keydown", event => {
    if ((event.key === "Enter" || event.key === " ") && event.target.matches("g[data-pfn]") && follow(event.target)) event.preventDefault();
  });
  new ResizeObserver(soon).observe(chart);
  addEventListener("beforeprint", draw);
  draw();
})();
