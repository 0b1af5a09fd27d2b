// Draws a request's trace. Data: the JSON element #trace, written by trace_page.cc. Matrices are
// [layers * kvHeads][segments], flat; null: none was computed; selected -1: a dense segment.
'use strict';
const T = JSON.parse(document.getElementById('trace').textContent);
const rows = T.layers * T.kvHeads;
const $ = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const count = (n) => Math.round(n).toLocaleString('en-US').replace(/,/g, '\u2009');
const short = (n) => n >= 10000 ? +(n / 1000).toFixed(0) + 'k' : n >= 1000 ? +(n / 1000).toFixed(1) + 'k' : String(+n.toFixed(2));
const number = (x) => x === 0 ? '0' : Math.abs(x) < 1e-3 ? x.toExponential(1) : String(+x.toPrecision(3));
const percent = (x) => (100 * x).toFixed(x < 0.1 ? 1 : 0) + '\u202f%';
const clamp = (x, lo, hi) => Math.min(hi, Math.max(lo, x));

// --- colours ---
const VIRIDIS = ['440154', '482878', '3e4989', '31688e', '26828e', '1f9e89', '35b779', '6ece58', 'b5de2b', 'fde725']
    .map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
// t in [0, 1].
function colour(t) {
  const x = clamp(t, 0, 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(x), VIRIDIS.length - 2);
  return VIRIDIS[i].map((c, k) => Math.round(c + (x - i) * (VIRIDIS[i + 1][k] - c)));
}
const rgb = (t) => `rgb(${colour(t)})`;
// Okabe and Ito's, told apart by dashes from the ninth head on.
const HEADS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#8c8c8c', '#b3a100'];
const DASHES = ['', '6 3', '2 3', '9 3 2 3'];

// --- drawing helpers ---
// A canvas of CSS size w x h, sharp on any display.
function prepare(canvas, w, h) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(w * scale);
  canvas.height = Math.round(h * scale);
  canvas.style.width = w + 'px';
  canvas.style.height = h + 'px';
  const g = canvas.getContext('2d');
  g.scale(scale, scale);
  g.font = '12px system-ui, "DejaVu Sans", sans-serif';
  return g;
}
function hatch(g) {
  const tile = document.createElement('canvas');
  tile.width = tile.height = 6;
  const t = tile.getContext('2d');
  // A light line beside a dark one shows on every colour.
  for (const [shift, style] of [[0, css('--hatch')], [1.2, 'rgba(0, 0, 0, .45)']]) {
    t.strokeStyle = style;
    t.lineWidth = 1.1;
    for (const d of [-6, 0, 6]) {
      t.beginPath();
      t.moveTo(d - 1 + shift, 7);
      t.lineTo(d + 7 + shift, -1);
      t.stroke();
    }
  }
  return g.createPattern(tile, 'repeat');
}
// value(row, column) -> [0, 1], or null for none; one pixel each, to be scaled up.
function bitmap(h, w, value) {
  const canvas = document.createElement('canvas');
  canvas.width = w;
  canvas.height = h;
  const g = canvas.getContext('2d'), image = g.createImageData(w, h);
  const none = css('--none').slice(1).match(/../g).map((x) => parseInt(x, 16));
  const ramp = Array.from({length: 256}, (_, i) => colour(i / 255));
  for (let i = 0, r = 0; r < h; ++r) {
    for (let c = 0; c < w; ++c, i += 4) {
      const v = value(r, c);
      image.data.set(v === null ? none : ramp[Math.round(clamp(v, 0, 1) * 255)], i);
      image.data[i + 3] = 255;
    }
  }
  g.putImageData(image, 0, 0);
  return canvas;
}
function legend(id, marks, title) {
  const w = 230, pad = 16, g = prepare($(id), w + 2 * pad, 44);
  for (let x = 0; x < w; ++x) {
    g.fillStyle = rgb(x / (w - 1));
    g.fillRect(pad + x, 16, 1, 11);
  }
  g.fillStyle = css('--soft');
  g.fillText(title, pad, 11);
  g.textAlign = 'center';
  let free = -1e9;  // labels that would touch are left out
  for (const [t, label, important] of marks.sort((a, b) => !!b[2] - !!a[2] || a[0] - b[0])) {
    const x = pad + t * w, half = g.measureText(label).width / 2 + 2;
    if (important) free = [x - half, x + half];
    else if (Array.isArray(free) && x + half > free[0] && x - half < free[1]) continue;
    g.fillStyle = css('--soft');
    g.fillRect(x - 0.5, 27, 1, 4);
    g.fillText(label, x, 42);
  }
}
// A step that puts about `want` labels into `range`: 1, 2 or 5 times a power of ten.
function step(range, want) {
  const raw = range / want, power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw);
}

// --- what a cell says ---
const at = (row, segment) => row * T.segments + segment;
const isDense = (row, s) => T.selected[at(row, s)] < 0;
const earlier = (s) => s * T.segmentTokens;  // of this turn
const firstToken = (s) => T.cachedTokens + s * T.segmentTokens;
const lastToken = (s) => Math.min(firstToken(s + 1), T.cachedTokens + T.promptTokens) - 1;
const name = (row) => `layer ${Math.floor(row / T.kvHeads)}, kv head ${row % T.kvHeads}`;
function describe(row, s) {
  const i = at(row, s), lines = [`${name(row)}, segment ${s}`, `tokens ${count(firstToken(s))} to ${count(lastToken(s))}`];
  lines.push('entropy ' + (T.entropy[i] === null ? 'not computed' : `${number(T.entropy[i])} nats`));
  if (T.budget[i] !== null) lines.push(`budget ${count(T.budget[i])} tokens`);
  if (isDense(row, s)) {
    lines.push(s === 0 ? 'dense: it has no earlier segment' : `dense: reads all ${count(earlier(s))} earlier tokens`);
  } else {
    const tokens = T.selected[i] * T.blockTokens;
    lines.push(`reads ${count(T.selected[i])} blocks: ${count(tokens)} of ${count(earlier(s))} earlier tokens (${percent(tokens / earlier(s))})`);
  }
  if (T.rigid[row]) lines.push('rigid head');
  return lines.join('\n');
}
function showTip(text, x, y) {
  const tip = $('tip');
  tip.textContent = text;
  tip.style.display = 'block';
  const box = tip.getBoundingClientRect();
  tip.style.left = clamp(x + 16, 4, Math.max(4, innerWidth - box.width - 8)) + 'px';
  tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18) + 'px';
}
// Mouse and keyboard over a grid. grid(): {columns, rows, cell(x, y) -> [row, column] or null,
// box(row, column) -> [x, y, w, h]}.
function interact(canvas, grid, text, pick) {
  const cursor = canvas.parentElement.querySelector('.cursor');
  let current = null;
  const hide = () => { $('tip').style.display = cursor.style.display = 'none'; };
  const show = (cell, x, y) => {
    current = cell;
    const box = grid().box(...cell);
    ['left', 'top', 'width', 'height'].forEach((side, i) => { cursor.style[side] = box[i] + 'px'; });
    cursor.style.display = 'block';
    const frame = canvas.getBoundingClientRect();
    showTip(text(...cell), x ?? frame.left + box[0] + box[2], y ?? frame.top + box[1]);
  };
  canvas.addEventListener('mousemove', (event) => {
    const cell = grid().cell(event.offsetX, event.offsetY);
    cell ? show(cell, event.clientX, event.clientY) : hide();
  });
  canvas.addEventListener('mouseleave', hide);
  canvas.addEventListener('blur', hide);
  canvas.addEventListener('click', () => current && pick(current[0]));
  canvas.addEventListener('keydown', (event) => {
    const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (event.key === 'Escape') return hide();
    if (event.key === 'Enter' && current) return pick(current[0]);
    if (!move) return;
    event.preventDefault();
    const g = grid(), from = current || [0, -move[1]];
    show([clamp(from[0] + move[0], 0, g.rows - 1), clamp(from[1] + move[1], 0, g.columns - 1)]);
    $('spoken').textContent = text(...current);
  });
}

// --- heat maps of [rows, segments] ---
const LEFT = 66, MARK = 7, BOTTOM = 34;  // CSS pixels: row labels, rigid marks, axis
function layout(canvas, shownRows, columns) {
  const width = Math.max(columns, canvas.parentElement.clientWidth - LEFT - 6);
  const height = clamp(Math.floor(620 / shownRows), 3, 16);
  return {w: width / columns, h: height, width, height: height * shownRows};
}
function rowLabels(g, top, h, shown) {  // shown: row numbers
  const layers = shown.length / T.kvHeads, every = Math.max(1, Math.ceil(15 / (h * T.kvHeads)));
  g.textAlign = 'right';
  g.textBaseline = 'middle';
  for (let i = 0; i < layers; ++i) {
    const layer = Math.floor(shown[i * T.kvHeads] / T.kvHeads), y = top + i * T.kvHeads * h;
    g.fillStyle = css('--soft');
    if (layer % every === 0 || layers === 1) g.fillText('layer ' + layer, LEFT - MARK - 7, y + T.kvHeads * h / 2);
  }
  g.fillStyle = css('--mark');
  shown.forEach((row, i) => { if (T.rigid[row]) g.fillRect(LEFT - MARK - 1, top + i * h + (h > 4 ? 0.5 : 0), MARK - 1, h - (h > 4 ? 1 : 0)); });
  g.textBaseline = 'alphabetic';
}
function layerRules(g, left, top, width, h, layers) {
  g.fillStyle = css('--panel');
  if (h * T.kvHeads >= 9) for (let i = 1; i < layers; ++i) g.fillRect(left, top + i * T.kvHeads * h - 0.5, width, 1);
}
function tokenAxis(g, x0, x1, y, begin, end) {  // positions begin..end over pixels x0..x1
  g.fillStyle = css('--soft');
  g.textAlign = 'center';
  const by = step(end - begin, (x1 - x0) / 90);
  for (let p = Math.ceil(begin / by) * by; p <= end; p += by) {
    const x = x0 + (p - begin) / (end - begin) * (x1 - x0);
    g.fillRect(x - 0.5, y, 1, 4);
    g.fillText(short(p), x, y + 17);
  }
}
function heatMap(id, value, label) {
  const canvas = $(id), box = layout(canvas, rows, T.segments);
  const g = prepare(canvas, LEFT + box.width + 6, box.height + BOTTOM);
  g.imageSmoothingEnabled = false;
  g.drawImage(bitmap(rows, T.segments, value), LEFT, 0, box.width, box.height);
  g.fillStyle = hatch(g);
  for (let row = 0; row < rows; ++row) {
    for (let s = 0; s < T.segments;) {  // runs of dense cells at once
      let end = s;
      while (end < T.segments && isDense(row, end)) ++end;
      if (end > s) g.fillRect(LEFT + s * box.w, row * box.h, (end - s) * box.w, box.h);
      s = end + 1;
    }
  }
  layerRules(g, LEFT, 0, box.width, box.h, T.layers);
  rowLabels(g, 0, box.h, Array.from({length: rows}, (_, i) => i));
  tokenAxis(g, LEFT, LEFT + box.width, box.height, firstToken(0), firstToken(T.segments));
  g.textAlign = 'left';
  g.fillText('token', 12, box.height + 17);
  canvas.setAttribute('aria-label', label);
}
function mapGrid(id) {
  const box = layout($(id), rows, T.segments);
  return {
    rows, columns: T.segments,
    cell(x, y) {
      const row = Math.floor(y / box.h), s = Math.floor((x - LEFT) / box.w);
      return row >= 0 && row < rows && s >= 0 && s < T.segments ? [row, s] : null;
    },
    box: (row, s) => [LEFT + s * box.w, row * box.h, box.w, box.h],
  };
}

// --- entropy ---
const entropies = T.entropy.filter((x) => x !== null);
const highest = entropies.reduce((a, b) => Math.max(a, b), 0) || 1;
const FLOOR = 1e-6;  // nats: the log scale's lower end, below the usual e_t of 1e-5
function drawEntropy() {
  const scale = $('entropy-scale').value, decades = Math.log(highest / FLOOR);
  const log = (x) => Math.log(Math.max(x, FLOOR) / FLOOR) / decades;
  const most = (s) => Math.log(Math.max(2, earlier(s) / T.blockTokens));  // even over all visible blocks
  heatMap('entropy', (row, s) => {
    const x = T.entropy[at(row, s)];
    return x === null ? null : scale === 'log' ? log(x) : scale === 'linear' ? x / highest : x / most(s);
  }, `Heat map of attention entropy, ${rows} heads by ${T.segments} segments, 0 to ${number(highest)} nats`);
  const marks = [];
  if (scale === 'log') {
    for (let x = FLOOR; x <= highest; x *= 100) marks.push([log(x), x < 0.01 ? '10' + '\u207b' + '\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076'[-Math.round(Math.log10(x))] : number(x)]);
    if (T.judged && T.rigidBelow > FLOOR && T.rigidBelow < highest) marks.push([log(T.rigidBelow), 'rigid', true]);
  } else {
    const top = scale === 'linear' ? highest : 1;
    for (let i = 0; i <= 4; ++i) marks.push([i / 4, scale === 'linear' ? number(top * i / 4) : percent(i / 4)]);
  }
  legend('entropy-legend', marks, scale === 'share' ? 'entropy / log(visible blocks)' : 'entropy, nats');
}

// --- reads ---
function drawRead() {
  const metric = $('read-metric').value;
  const tokens = (i) => T.selected[i] < 0 ? null : T.selected[i] * T.blockTokens;
  const value = (row, s) => {
    const i = at(row, s);
    if (metric === 'budget') return T.budget[i];
    if (metric === 'share') return s === 0 ? null : isDense(row, s) ? 1 : tokens(i) / earlier(s);
    return s === 0 ? null : isDense(row, s) ? earlier(s) : tokens(i);
  };
  // Dense segments would set the scale of long prompts; they are hatched and shown at its end.
  let top = 0;
  for (let row = 0; row < rows; ++row) {
    for (let s = 0; s < T.segments; ++s) if (metric === 'budget' || !isDense(row, s)) top = Math.max(top, value(row, s) ?? 0);
  }
  if (metric === 'share') top = 1;
  top = top || 1;
  heatMap('read', (row, s) => { const x = value(row, s); return x === null ? null : x / top; },
          `Heat map of ${metric}, ${rows} heads by ${T.segments} segments, 0 to ${number(top)}`);
  legend('read-legend', [0, 1, 2, 3, 4].map((i) => [i / 4, metric === 'share' ? percent(i / 4) : short(top * i / 4)]),
         metric === 'share' ? 'share of earlier tokens' : 'tokens');
}
function drawLines() {
  const layer = +$('layer').value, entropy = $('line-metric').value === 'entropy';
  const W = 1080, H = 250, L = 62, R = 12, TOP = 10, B = 30;
  const series = [];  // [head, values, dashed]
  for (let h = 0; h < T.kvHeads; ++h) {
    const pick = (f) => Array.from({length: T.segments}, (_, s) => f(at(layer * T.kvHeads + h, s), s));
    if (entropy) series.push([h, pick((i) => T.entropy[i]), 1]);
    else series.push([h, pick((i) => T.budget[i]), 0.4], [h, pick((i) => T.selected[i] < 0 ? null : T.selected[i] * T.blockTokens), 1]);
  }
  const top = Math.max(...series.flatMap((x) => x[1]).map((x) => x ?? 0)) || 1;
  const x = (s) => L + (T.segments === 1 ? 0.5 : s / (T.segments - 1)) * (W - L - R), y = (v) => H - B - v / top * (H - B - TOP);
  let svg = `<svg viewBox="0 0 ${W} ${H}" width="100%" role="img" aria-label="Lines per kv head of layer ${layer}" style="max-width:${W}px;display:block" font-size="12">`;
  const by = step(top, 4);
  for (let v = 0; v <= top * 1.001; v += by) {
    svg += `<path d="M${L} ${y(v)}H${W - R}" stroke="${css('--line')}"/><text x="${L - 8}" y="${y(v) + 4}" text-anchor="end" fill="${css('--soft')}">${entropy ? number(v) : short(v)}</text>`;
  }
  const every = Math.max(1, Math.ceil(step(T.segments, 14)));
  for (let s = 0; s < T.segments; s += every) svg += `<text x="${x(s)}" y="${H - 10}" text-anchor="middle" fill="${css('--soft')}">${s}</text>`;
  for (const [h, values, weight] of series) {
    let path = '', pen = 'M';
    values.forEach((v, s) => {
      if (v === null) return void (pen = 'M');
      path += `${pen}${x(s).toFixed(1)} ${y(v).toFixed(1)}`;
      if (pen === 'M' && (values[s + 1] ?? null) === null) path += 'h0.01';  // a lone point
      pen = 'L';
    });
    svg += `<path d="${path}" fill="none" stroke="${HEADS[h % 8]}" stroke-width="${weight < 1 ? 5 : 2}" stroke-linecap="round" stroke-linejoin="round" opacity="${weight}" stroke-dasharray="${weight < 1 ? '' : DASHES[Math.floor(h / 8) % 4]}"/>`;
  }
  $('lines').innerHTML = svg + `</svg>`;
  $('line-legend').innerHTML = Array.from({length: T.kvHeads}, (_, h) => `<span><i class="key" style="border-color:${HEADS[h % 8]};border-top-style:${h < 8 ? 'solid' : 'dashed'}"></i>kv head ${h}${T.rigid[layer * T.kvHeads + h] ? ' (rigid)' : ''}</span>`).join('') +
      (entropy ? '<span>nats over segments</span>' : '<span>tokens over segments; broad and pale: budget, narrow: selected</span>');
}

// --- kept tokens ---
const FIRST = 16, LAST = 2 * Math.max(16, T.windowTokens || 0), PROFILE = 54, GAP = 16;
const runs = (T.kept || []).map((flat) => {  // [gap, length, ...] -> [begin, end) pairs
  const out = [];
  for (let i = 0, p = 0; i < flat.length; i += 2) out.push([p += flat[i], p += flat[i + 1]]);
  return out;
});
const extent = runs.reduce((most, r) => Math.max(most, r.length ? r[r.length - 1][1] : 0), 0);
const keptTokens = runs.map((r) => r.reduce((sum, [a, b]) => sum + b - a, 0));
const isKept = (row, p) => runs[row].some(([a, b]) => a <= p && p < b);
// Share kept of each of `bins` equal ranges of [0, extent).
function density(row, bins) {
  const out = new Float32Array(bins), width = extent / bins;
  for (const [a, b] of runs[row]) {
    for (let i = Math.floor(a / width); i < bins && i * width < b; ++i) {
      out[i] += Math.max(0, Math.min(b, (i + 1) * width) - Math.max(a, i * width)) / width;
    }
  }
  return out;
}
const shownRows = () => Array.from({length: rows}, (_, i) => i)
    .filter((row) => !$('one-layer').checked || Math.floor(row / T.kvHeads) === +$('layer').value);
let strips = null;  // what is drawn: {shown, h, x: [first, middle, last], bins, densities}
function drawKept() {
  const canvas = $('kept'), shown = shownRows(), total = canvas.parentElement.clientWidth - 6;
  const h = clamp(Math.floor(600 / shown.length), 3, 22), height = h * shown.length, firstCount = Math.min(FIRST, extent), lastCount = Math.min(LAST, extent);
  const firstWidth = firstCount * 6, lastWidth = lastCount * (lastCount > 80 ? 2 : 3);
  const middle = LEFT + firstWidth + GAP, width = Math.max(200, total - middle - GAP - lastWidth), last = middle + width + GAP;
  const bins = Math.max(1, Math.min(extent, Math.floor(width / 2))), top = PROFILE + 22;
  const g = prepare(canvas, last + lastWidth + 6, top + height + BOTTOM);
  const densities = shown.map((row) => density(row, bins));
  const sorted = Float32Array.from(densities.flatMap((d) => Array.from(d))).sort();
  const full = sorted[Math.floor((sorted.length - 1) * 0.995)] || 1;  // a few full bins must not hide the rest
  g.imageSmoothingEnabled = false;
  const single = (row, p) => isKept(row, p) ? 1 : 0;
  g.drawImage(bitmap(shown.length, firstCount, (r, c) => single(shown[r], c)), LEFT, top, firstWidth, height);
  g.drawImage(bitmap(shown.length, bins, (r, c) => densities[r][c] / full), middle, top, width, height);
  g.drawImage(bitmap(shown.length, lastCount, (r, c) => single(shown[r], extent - lastCount + c)), last, top, lastWidth, height);
  for (const [x, w] of [[LEFT, firstWidth], [middle, width], [last, lastWidth]]) layerRules(g, x, top, w, h, shown.length / T.kvHeads);
  rowLabels(g, top, h, shown);
  // The mean over the rows.
  const mean = Array.from({length: bins}, (_, i) => densities.reduce((sum, d) => sum + d[i], 0) / shown.length);
  const peak = Math.max(...mean) || 1, base = PROFILE + 12;
  g.fillStyle = css('--accent');
  mean.forEach((v, i) => g.fillRect(middle + i * width / bins, base - v / peak * PROFILE, Math.ceil(width / bins), v / peak * PROFILE));
  g.fillStyle = css('--soft');
  g.textAlign = 'right';
  g.fillText(percent(peak), middle - 5, base - PROFILE + 9);
  // Sinks, window, and where the answer begins.
  const bracket = (x, w, text, align) => {
    g.fillStyle = css('--mark');
    g.fillRect(x, top - 5, w, 3);
    g.textAlign = align;
    g.fillText(text, align === 'right' ? x + w : x, top - 10);
  };
  if (T.sinks) bracket(LEFT, T.sinks * firstWidth / firstCount, 'sinks', 'left');
  const perToken = lastWidth / lastCount;
  if (T.windowTokens) bracket(last + (lastCount - T.windowTokens) * perToken, T.windowTokens * perToken, 'window', 'right');
  const answer = T.cachedTokens + T.promptTokens;
  if (answer < extent && answer > extent - lastCount) {
    g.fillStyle = css('--mark');
    g.fillRect(last + (lastCount - extent + answer) * perToken - 1, top, 2, height + 5);
  }
  g.fillStyle = css('--soft');
  g.textAlign = 'center';
  g.fillText(`first ${firstCount}`, LEFT + firstWidth / 2, top + height + 17);
  g.fillText(answer < extent && answer > extent - lastCount ? `last ${lastCount}; line: answer` : `last ${lastCount}`, last + lastWidth / 2, top + height + 17);
  tokenAxis(g, middle, middle + width, top + height, 0, extent);
  legend('kept-legend', [0, 1, 2, 3, 4].map((i) => [i / 4, percent(full * i / 4)]), 'share of tokens kept');
  canvas.setAttribute('aria-label', `Kept tokens by position, ${shown.length} heads, ${extent} positions`);
  strips = {shown, h, top, bins, densities, panels: [[LEFT, firstWidth, firstCount, 0], [middle, width, bins, -1], [last, lastWidth, lastCount, extent - lastCount]]};
}
const keptGrid = () => ({
  rows: strips.shown.length, columns: strips.panels.reduce((sum, p) => sum + p[2], 0),
  cell(x, y) {
    const row = Math.floor((y - strips.top) / strips.h);
    if (row < 0 || row >= strips.shown.length) return null;
    let before = 0;
    for (const [left, width, n] of strips.panels) {
      if (x >= left && x < left + width) return [row, before + Math.floor((x - left) / width * n)];
      before += n;
    }
    return null;
  },
  box(row, column) {
    const [panel, i] = keptPanel(column), [left, width, n] = panel;
    return [left + i * width / n, strips.top + row * strips.h, width / n, strips.h];
  },
});
function keptPanel(column) {
  for (const panel of strips.panels) {
    if (column < panel[2]) return [panel, column];
    column -= panel[2];
  }
  return null;
}
function describeKept(r, column) {
  const row = strips.shown[r], [panel, i] = keptPanel(column), head = `${name(row)}: ${count(keptTokens[row])} of ${count(extent)} tokens kept\n`;
  if (panel[3] >= 0) return head + `token ${count(panel[3] + i)} ${isKept(row, panel[3] + i) ? 'kept' : 'dropped'}`;
  const width = extent / strips.bins;
  return head + `tokens ${count(i * width)} to ${count((i + 1) * width - 1)}: ${percent(strips.densities[r][i])} kept`;
}

// --- wiring ---
function drawAll() {
  document.querySelectorAll('.none').forEach((e) => { e.style.background = css('--none'); });
  document.querySelectorAll('canvas.dense').forEach((canvas) => {
    const g = prepare(canvas, 22, 13);
    g.fillStyle = rgb(0.4);
    g.fillRect(0, 0, 22, 13);
    g.fillStyle = hatch(g);
    g.fillRect(0, 0, 22, 13);
  });
  drawEntropy();
  drawRead();
  drawLines();
  if (extent > 0) drawKept();
}
function setLayer(layer) {
  $('layer').value = layer;
  $('layer-name').textContent = $('kept-layer').textContent = layer;
  drawLines();
  if (extent > 0 && $('one-layer').checked) drawKept();
}
function fact(key, text) {
  document.querySelectorAll(`[data-fact=${key}]`).forEach((e) => { e.textContent = text; e.hidden = !text; });
}
function start() {
  const traced = rows > 0 && T.segments > 0;
  $('no-trace').hidden = traced;
  document.querySelectorAll('.traced').forEach((e) => { e.hidden = !traced; });
  if (!traced) return;
  fact('segment', count(T.segmentTokens));
  fact('block', `${T.blockTokens} tokens`);
  fact('rigid', `rigid: ${T.rigid.filter(Boolean).length} of ${T.judged} judged heads (every entropy below ${number(T.rigidBelow)})`);
  document.querySelectorAll('.rigid-key').forEach((e) => { e.hidden = !T.judged; });
  fact('sinks', T.sinks ? `sinks: the first ${T.sinks} tokens, always kept` : '');
  fact('window', T.windowTokens ? `window: the last ${T.windowTokens}, always kept` : '');
  $('not-compressed').hidden = extent > 0;
  $('kept-part').hidden = extent === 0;
  $('layer').max = T.layers - 1;
  $('layer').addEventListener('input', (event) => setLayer(+event.target.value));
  $('entropy-scale').addEventListener('change', drawEntropy);
  $('read-metric').addEventListener('change', drawRead);
  $('line-metric').addEventListener('change', drawLines);
  $('one-layer').addEventListener('change', drawKept);
  // A logarithmic scale where most entropies are tiny, as the box estimator's.
  const median = Float32Array.from(entropies).sort()[entropies.length >> 1] || 0;
  $('entropy-scale').value = median < highest / 10 ? 'log' : 'linear';
  const pick = (row) => setLayer(Math.floor(row / T.kvHeads));
  interact($('entropy'), () => mapGrid('entropy'), describe, pick);
  interact($('read'), () => mapGrid('read'), describe, pick);
  if (extent > 0) interact($('kept'), keptGrid, describeKept, (r) => pick(strips.shown[r]));
  setLayer(Math.min(T.layers - 1, Math.floor(T.layers / 2)));
  drawAll();
  addEventListener('resize', drawAll);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawAll);
}
start();
