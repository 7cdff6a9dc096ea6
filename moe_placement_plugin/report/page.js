// Figures of the report. Heatmap values are multiples of the mean, packed as 16-bit steps of `most`.
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");
const figures = [];
const tip = document.getElementById("tip");

function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  const steps = new DataView(bytes.buffer);
  const values = new Float32Array(packed.rows * packed.columns);
  for (let i = 0; i < values.length; i++) values[i] = steps.getUint16(2 * i, true) / 65535 * packed.most;
  return values;
}

// Little load fades into the panel, the mean is blue, much is yellow to red; checked against colour blindness by lightness.
const COLOURS = {
  light: [[255, 255, 255], [190, 215, 240], [110, 165, 220], [60, 90, 170], [90, 50, 145], [110, 30, 120], [70, 0, 40]],
  dark: [[24, 30, 38], [32, 56, 92], [44, 96, 160], [110, 140, 215], [200, 130, 190], [250, 190, 90], [255, 245, 200]],
};
// Experts differ by far more than ranks, which hold many of them.
const EXPERTS = { at: [0, .5, 1, 2, 3, 4, 8], steps: [0, 1, 2, 4, 8] };
const RANKS = { at: [0, .5, 1, 1.4, 1.7, 2, 3], steps: [0, .5, 1, 1.5, 2, 3] };
const stopsOf = (range) => range.at.map((value, i) => [value, COLOURS[dark.matches ? "dark" : "light"][i]]);
function colour(value, stops) {
  let i = 1;
  while (i < stops.length - 1 && value > stops[i][0]) i++;
  const [from, a] = stops[i - 1], [to, b] = stops[i];
  const t = Math.min(1, Math.max(0, (value - from) / (to - from)));
  return a.map((c, k) => c + (b[k] - c) * t);
}

function section(title, hint) {
  const node = document.createElement("section");
  const head = document.createElement("div");
  head.className = "head";
  const h2 = document.createElement("h2");
  h2.textContent = title;
  head.append(h2);
  const p = document.createElement("p");
  p.className = "hint";
  p.textContent = hint;
  node.append(head, p);
  document.getElementById("figures").append(node);
  return node;
}

function pngButton(canvas, name) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "PNG";
  button.setAttribute("aria-label", `Save ${name} as PNG`);
  button.addEventListener("click", () => {
    const copy = document.createElement("canvas");
    copy.width = canvas.width;
    copy.height = canvas.height;
    const pen = copy.getContext("2d");
    pen.fillStyle = css("--panel");
    pen.fillRect(0, 0, copy.width, copy.height);
    pen.drawImage(canvas, 0, 0);
    const link = document.createElement("a");
    link.download = `${name.replace(/[^\w]+/g, "-").toLowerCase()}.png`;
    link.href = copy.toDataURL("image/png");
    link.click();
  });
  return button;
}

// A canvas that is redrawn for its width, the screen's resolution and the colour scheme; `pick` names what lies under a point.
function figure(parent, label, height, draw, pick) {
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  parent.append(canvas);
  const state = { canvas, paint() {
    const width = canvas.clientWidth, scale = Math.max(1, devicePixelRatio || 1), tall = height(width);
    canvas.style.height = `${tall}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(tall * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = "12px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
    state.area = draw(pen, width, tall);
  } };
  const show = (event) => {
    const box = canvas.getBoundingClientRect();
    const text = state.area && pick(event.clientX - box.left, event.clientY - box.top, state.area);
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8))}px`;
  };
  canvas.addEventListener("pointermove", show);
  canvas.addEventListener("pointerdown", show);
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  figures.push(state);
  return canvas;
}

// Marks at round numbers, no closer than `room` pixels.
function marks(count, length, room) {
  const most = Math.max(1, Math.floor(length / room));
  let step = 1;
  for (const s of [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000]) { step = s; if (count / s <= most) break; }
  const result = [];
  for (let i = 0; i < count; i += step) result.push(i);
  return result;
}

function heatmap(parent, label, packed, range, rowName, columnName, rowLabel, unit, square) {
  const values = unpack(packed), { rows, columns } = packed;
  const left = 44, top = 6, bottom = 50, right = 6;
  const height = (width) => square ? Math.min(width, 560) + bottom : Math.max(150, Math.min(520, rows * 6)) + top + bottom;
  const draw = (pen, width, tall) => {
    const stops = stopsOf(range);
    const image = new ImageData(columns, rows);
    for (let i = 0; i < values.length; i++) {
      const [r, g, b] = colour(values[i], stops);
      image.data.set([r, g, b, 255], 4 * i);
    }
    const small = document.createElement("canvas");
    small.width = columns;
    small.height = rows;
    small.getContext("2d").putImageData(image, 0, 0);
    let w = width - left - right;
    const h = tall - top - bottom;
    if (square) w = Math.min(w, h);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, left, top, w, h);
    pen.strokeStyle = css("--line");
    pen.strokeRect(left - .5, top - .5, w + 1, h + 1);
    pen.fillStyle = css("--quiet");
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const row of marks(rows, h, 22)) pen.fillText(rowLabel(row), left - 6, top + (row + .5) * h / rows);
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (const column of marks(columns, w, 36)) pen.fillText(column, left + (column + .5) * w / columns, top + h + 4);
    pen.fillText(columnName, left + w / 2, top + h + 19);
    pen.save();
    pen.translate(10, top + h / 2);
    pen.rotate(-Math.PI / 2);
    pen.textBaseline = "middle";
    pen.fillText(rowName, 0, 0);
    pen.restore();
    scale(pen, left + w, top + h + 34, stops, range.steps, packed.most);
    return { left, top, w, h };
  };
  const pick = (x, y, area) => {
    const column = Math.floor((x - area.left) / area.w * columns), row = Math.floor((y - area.top) / area.h * rows);
    if (column < 0 || row < 0 || column >= columns || row >= rows) return "";
    return `${rowName} ${rowLabel(row)}, ${columnName} ${column}: ${values[row * columns + column].toFixed(2)}x ${unit}`;
  };
  return figure(parent, label, height, draw, pick);
}

function scale(pen, right, y, stops, all, most) {
  const last = all[all.length - 1], steps = all.filter((s, i) => s <= 1 || all[i - 1] < most);
  let x = right;
  pen.textAlign = "right";
  pen.textBaseline = "top";
  for (const step of steps.reverse()) {
    const text = step === last ? `${last}x or more` : `${step}x`;
    pen.fillStyle = css("--quiet");
    pen.fillText(text, x, y);
    x -= pen.measureText(text).width + 16;
    pen.fillStyle = `rgb(${colour(step, stops).map(Math.round).join(",")})`;
    pen.fillRect(x, y, 12, 12);
    pen.strokeStyle = css("--line");
    pen.strokeRect(x + .5, y + .5, 11, 11);
    x -= 10;
  }
}

function lines(parent, label, series, names, axis) {
  const count = series[0].values.length, left = 44, right = 12, top = 10, bottom = 40;
  const least = Math.min(...series.flatMap((s) => s.values));
  const floor = Math.max(0, Math.floor(least * 10) / 10 - (least < 1 ? 0 : .1));
  const at = (area, i) => area.left + (count === 1 ? .5 : i / (count - 1)) * area.w;
  const draw = (pen, width, tall) => {
    const area = { left, top, w: width - left - right, h: tall - top - bottom };
    const y = (v) => top + (1 - (v - floor) / (1 - floor)) * area.h;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (let v = floor; v <= 1.0001; v += (1 - floor) / 4) {
      pen.strokeStyle = css("--line");
      pen.beginPath();
      pen.moveTo(left, Math.round(y(v)) + .5);
      pen.lineTo(width - right, Math.round(y(v)) + .5);
      pen.stroke();
      pen.fillStyle = css("--quiet");
      pen.fillText(v.toFixed(2), left - 6, y(v));
    }
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (const i of marks(count, area.w, 40)) pen.fillText(axis === "layer" ? names[i] : i + 1, at(area, i), top + area.h + 6);
    pen.fillText(axis, left + area.w / 2, top + area.h + 22);
    series.forEach((s, k) => {
      pen.strokeStyle = pen.fillStyle = css(`--series-${k % 6}`);
      pen.lineWidth = 2;
      pen.beginPath();
      s.values.forEach((v, i) => i ? pen.lineTo(at(area, i), y(v)) : pen.moveTo(at(area, i), y(v)));
      pen.stroke();
      if (count <= 40) s.values.forEach((v, i) => { pen.beginPath(); pen.arc(at(area, i), y(v), 3, 0, 7); pen.fill(); });
    });
    pen.lineWidth = 1;
    return area;
  };
  const pick = (x, y, area) => {
    const i = count === 1 ? 0 : Math.round((x - area.left) / area.w * (count - 1));
    if (i < 0 || i >= count) return "";
    const name = axis === "layer" ? `layer ${names[i]}` : names[i] || `window ${i + 1}`;
    return `${name}: ${series.map((s) => `${s.name} ${s.values[i].toFixed(3)}`).join(", ")}`;
  };
  const legend = document.createElement("div");
  legend.className = "legend";
  series.forEach((s, k) => {
    const entry = document.createElement("span"), swatch = document.createElement("i");
    swatch.style.background = `var(--series-${k % 6})`;
    entry.append(swatch, s.name);
    legend.append(entry);
  });
  parent.append(legend);
  return figure(parent, label, () => 260, draw, pick);
}

function build() {
  const layerName = (row) => DATA.layers[row];
  let node = section("Load by layer and expert", "Tokens of each expert as a multiple of its layer's mean. An even load would be one colour.");
  node.firstChild.append(pngButton(heatmap(node, "Load by layer and expert", DATA.load, EXPERTS, "layer", "expert", layerName, "the mean"), "load by layer and expert"));
  if (DATA.placements.length) {
    node = section("Rank load by layer", "Tokens of each rank as a multiple of the mean: what a step waits for is the darkest (in dark mode brightest) rank of each layer.");
    const pair = document.createElement("div");
    pair.className = "pair";
    node.append(pair);
    for (const placement of DATA.placements) {
      const cell = document.createElement("div"), head = document.createElement("div"), h3 = document.createElement("h3");
      head.className = "head";
      h3.textContent = placement.name;
      head.append(h3);
      cell.append(head);
      pair.append(cell);
      const label = `Rank load by layer with ${placement.name}`;
      head.append(pngButton(heatmap(cell, label, placement.ranks, RANKS, "layer", "rank", layerName, "the mean"), label));
    }
    for (const [axis, key, names, title, hint] of [
      ["layer", "perLayer", DATA.layers, "Balancedness by layer", "Mean rank load divided by the greatest; 1 is perfect."],
      ["window", "perWindow", DATA.windows, "Balancedness over windows", "Over all layers, window after window; a drop says that the load has moved away from the plan."],
    ]) {
      if (axis === "window" && DATA.windows.length < 2) continue;
      node = section(title, hint);
      const series = DATA.placements.map((p) => ({ name: p.name, values: p[key] }));
      node.firstChild.append(pngButton(lines(node, title, series, names, axis), title));
    }
  }
  for (const pair of DATA.pairs) {
    const title = `Experts chosen together in layer ${pair.layer}`;
    node = section(title, "Tokens that chose both experts, as a multiple of the mean pair. Experts that go together cost less traffic on one rank.");
    node.firstChild.append(pngButton(heatmap(node, title, pair.values, EXPERTS, "expert", "expert", (row) => row, "the mean pair", true), title));
  }
}

build();
const paint = () => { for (const f of figures) f.paint(); document.documentElement.dataset.painted = figures.length; };
paint();
addEventListener("resize", paint);
dark.addEventListener("change", paint);
