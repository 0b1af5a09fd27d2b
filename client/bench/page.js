// Draws a bench. Data: the JSON element #bench, written by page.cc. Latencies are in ms; `curve` has the
// quantiles 0, 0.5, 1 ... 100 percent.
'use strict';
const B = JSON.parse(document.getElementById('bench').textContent);
const $ = (id) => document.getElementById(id);
const unique = (list) => [...new Set(list)];
const loads = unique(B.rows.map((row) => row.load)), policies = unique(B.rows.map((row) => row.policy));
const LATENCIES = {ttft: 'time to first token', tpot: 'time per output token', itl: 'inter-token latency',
  e2el: 'end to end', queue: 'queueing in the client'};
const STATS = {p50: 'median', mean: 'mean', p90: '90th percentile', p95: '95th percentile', p99: '99th percentile'};
const RATES = {outputPerSecond: 'output tokens/s', tokensPerSecond: 'tokens/s in all', requestsPerSecond: 'requests/s',
  goodput: 'requests/s within the objectives'};
// Okabe and Ito's, which differ for colour-blind readers too; loads differ by dashes.
const COLOURS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#8c8c8c', '#b3a100'];
const DASHES = ['', '7 3', '2 3', '9 3 2 3', '4 2'];
const colour = (policy) => COLOURS[policies.indexOf(policy) % COLOURS.length];
const dash = (load) => DASHES[loads.indexOf(load) % DASHES.length];
const number = (x) => x === null || x === undefined || Number.isNaN(x) ? '\u2013' :
    x === 0 ? '0' : Math.abs(x) >= 1e4 ? Math.round(x).toLocaleString('en-US').replace(/,/g, '\u2009') :
    Math.abs(x) < 1e-2 ? x.toExponential(1) : String(+x.toPrecision(Math.abs(x) >= 100 ? 4 : 3));
const percent = (x) => x === null ? '\u2013' : (100 * x).toFixed(1) + '\u202f%';

function element(tag, text) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  return node;
}
function svg(tag, attributes, text) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// --- scales ---
function niceStep(span, count) {
  const raw = span / count, power = 10 ** Math.floor(Math.log10(raw));
  return power * ([1, 2, 5].find((m) => m * power >= raw) || 10);
}
// Maps [lo, hi] to [from, to]; ticks inside. Logarithmic only over positive values.
function scale(lo, hi, from, to, log) {
  if (log) {
    lo = Math.max(lo, hi * 1e-6);
    if (!(hi > lo)) hi = lo * 10;
    const a = Math.log10(lo), b = Math.log10(hi), ticks = [];
    for (let p = Math.floor(a); p <= Math.ceil(b); ++p)
      for (const m of b - a > 3 ? [1] : [1, 2, 5]) if (m * 10 ** p >= lo && m * 10 ** p <= hi) ticks.push(m * 10 ** p);
    return {at: (x) => from + (to - from) * (Math.log10(Math.max(x, lo)) - a) / (b - a), ticks};
  }
  if (!(hi > lo)) hi = lo + 1;
  const step = niceStep(hi - lo, 6), ticks = [];
  for (let t = Math.ceil(lo / step) * step; t <= hi + step * 1e-6; t += step) ticks.push(t);
  return {at: (x) => from + (to - from) * (x - lo) / (hi - lo), ticks};
}

// --- a plot of lines: series {points: [[x, y, label]], colour, dash, dots} ---
const W = 1080, H = 400, LEFT = 76, RIGHT = 20, TOP = 14, BOTTOM = 48;
function plot(target, series, options) {
  const points = series.flatMap((s) => s.points);
  target.replaceChildren();
  if (points.length === 0) return target.append(element('p', 'Nothing was measured.'));
  const x = scale(options.log ? Math.min(...points.map((p) => p[0]).filter((v) => v > 0)) : 0,
      Math.max(...points.map((p) => p[0])) * (options.log ? 1 : 1.04), LEFT, W - RIGHT, options.log);
  const y = scale(0, options.top || Math.max(...points.map((p) => p[1])) * 1.06, H - BOTTOM, TOP, false);
  const root = svg('svg', {viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': `${options.yTitle} against ${options.xTitle}`});
  for (const t of x.ticks) {
    root.append(svg('line', {class: 'grid', x1: x.at(t), x2: x.at(t), y1: TOP, y2: H - BOTTOM}),
        svg('text', {x: x.at(t), y: H - BOTTOM + 18, 'text-anchor': 'middle'}, number(t)));
  }
  for (const t of y.ticks) {
    root.append(svg('line', {class: 'grid', x1: LEFT, x2: W - RIGHT, y1: y.at(t), y2: y.at(t)}),
        svg('text', {x: LEFT - 8, y: y.at(t) + 4, 'text-anchor': 'end'}, (options.yFormat || number)(t)));
  }
  root.append(svg('text', {x: (LEFT + W - RIGHT) / 2, y: H - 8, 'text-anchor': 'middle'}, options.xTitle),
      svg('text', {x: 14, y: (TOP + H - BOTTOM) / 2, 'text-anchor': 'middle',
        transform: `rotate(-90 14 ${(TOP + H - BOTTOM) / 2})`}, options.yTitle));
  const marks = [];  // inside the plot, and none over another
  const mark = (text, px, py) => {
    const width = 7 * text.length, left = px + 8 + width > W ? px - 8 - width : px + 8;
    const free = (y) => !marks.some((m) => Math.abs(m.y - y) < 13 && left < m.left + m.width && m.left < left + width);
    const top = [py - 7, py + 17, py + 31, py - 21, py - 35].find(free) ?? py - 7;
    marks.push({left, width, y: top});
    return svg('text', {x: left, y: top}, text);
  };
  for (const s of series) {
    root.append(svg('polyline', {points: s.points.map((p) => `${x.at(p[0])},${y.at(p[1])}`).join(' '), fill: 'none',
      stroke: s.colour, 'stroke-width': 2, 'stroke-dasharray': s.dash || '', 'stroke-linejoin': 'round'}));
    for (const p of s.dots ? s.points : []) {
      const dot = svg('circle', {cx: x.at(p[0]), cy: y.at(p[1]), r: 5, fill: s.colour});
      dot.append(svg('title', {}, p[2]));
      root.append(dot, mark(p[3], x.at(p[0]), y.at(p[1])));
    }
  }
  target.append(root);
}
function legend(target, items) {
  target.replaceChildren(...items.map(({name, colour, dash}) => {
    const item = element('span'), key = svg('svg', {viewBox: '0 0 26 10'});
    key.append(svg('line', {x1: 0, x2: 26, y1: 5, y2: 5, stroke: colour, 'stroke-width': 3, 'stroke-dasharray': dash || ''}));
    item.append(key, name);
    return item;
  }));
}
function choices(select, entries, onChange) {
  for (const [value, title] of entries) {
    const option = element('option', title);
    option.value = value;
    select.append(option);
  }
  select.addEventListener('change', onChange);
}
const statChoices = Object.keys(LATENCIES).flatMap((latency) => Object.keys(STATS).map(
    (stat) => [`${latency}.${stat}`, `${LATENCIES[latency]}, ${STATS[stat]}`]));
const figure = (row, key) => {
  const [name, stat] = key.split('.');
  const value = stat ? row[name][stat] : row[name];
  return value === undefined ? null : value;
};

// --- the parts of the page ---
function drawFacts() {
  $('subtitle').textContent = `${B.model}, ${B.dtype} on ${B.backend}, server ${B.server}`;
  if (B.ended) {
    $('ended').hidden = false;
    $('ended').textContent = `The run ended early: ${B.ended}. What follows was measured until then.`;
  }
  const facts = [['Date (UTC)', B.date], ['Seed', B.seed], ['Objectives', B.slo || 'none'],
    ['Requests completed', B.rows.reduce((sum, row) => sum + row.completed, 0)],
    ['Requests failed', B.rows.reduce((sum, row) => sum + row.failed, 0)]];
  for (const [name, value] of facts) {
    const group = element('div');
    group.append(element('dt', name), element('dd', String(value)));
    $('facts').append(group);
  }
  const group = element('div');
  group.style.gridColumn = '1 / -1';
  const command = element('dd');
  command.append(element('code', B.command));
  group.append(element('dt', 'Command'), command);
  $('facts').append(group);
}
function drawRows() {
  const columns = [['load', (r) => r.load], ['policy', (r) => r.policy], ['completed', (r) => r.completed],
    ['failed', (r) => Object.entries(r.errors).map(([code, n]) => `${code} ${n}`).join(', ') || '0'],
    ['cancelled', (r) => r.cancelled], ['slow', (r) => r.slow], ['seconds', (r) => number(r.seconds)],
    ['req/s', (r) => number(r.requestsPerSecond)],
    ['goodput', (r) => r.goodput === null ? '\u2013' : `${number(r.goodput)} (n ${r.good})`],
    ['out tok/s', (r) => number(r.outputPerSecond)], ['n', (r) => r.ttft.n],
    ['ttft p50', (r) => number(r.ttft.p50)], ['ttft p99', (r) => number(r.ttft.p99)],
    ['tpot p50', (r) => number(r.tpot.p50)], ['tpot p99', (r) => number(r.tpot.p99)],
    ['itl p99', (r) => number(r.itl.p99)], ['e2e p50', (r) => number(r.e2el.p50)], ['e2e p99', (r) => number(r.e2el.p99)],
    ['client queue p99', (r) => number(r.queue.p99)], ['attention', (r) => percent(r.attention)], ['kv kept', (r) => percent(r.kv)]];
  const head = element('tr');
  head.append(...columns.map(([name]) => element('th', name)));
  $('rows').append(head, ...B.rows.map((row) => {
    const line = element('tr');
    line.append(...columns.map(([, value]) => element('td', String(value(row)))));
    return line;
  }));
}
function drawSweep() {
  const xKey = $('sweep-x').value, yKey = $('sweep-y').value;
  const series = policies.map((policy) => ({colour: colour(policy), dots: true,
    points: B.rows.filter((row) => row.policy === policy && figure(row, xKey) !== null && figure(row, yKey) !== null)
        .map((row) => [figure(row, xKey), figure(row, yKey), `${row.load}, ${policy}: ${number(figure(row, xKey))} ${RATES[xKey]}, ` +
          `${number(figure(row, yKey))} ms (n ${row[yKey.split('.')[0]].n})`, row.load])}));
  plot($('sweep-plot'), series, {xTitle: RATES[xKey], yTitle: 'ms'});
  legend($('sweep-legend'), policies.map((policy) => ({name: policy, colour: colour(policy)})));
}
function drawCurves() {
  const metric = $('curve-metric').value, load = $('curve-load').value;
  const rows = B.rows.filter((row) => (load === '*' || row.load === load) && row[metric].n > 0);
  const series = rows.map((row) => ({colour: colour(row.policy), dash: dash(row.load),
    points: row[metric].curve.map((v, i) => [v, i / (row[metric].curve.length - 1)])}));
  plot($('curve-plot'), series, {xTitle: `${LATENCIES[metric]}, ms`, yTitle: 'share of samples', top: 1,
    yFormat: (t) => Math.round(t * 100) + '\u202f%', log: $('curve-log').checked});
  legend($('curve-legend'), rows.map((row) => ({name: `${row.load}, ${row.policy} (n ${row[metric].n})`,
    colour: colour(row.policy), dash: dash(row.load)})));
}
function drawBars() {
  const key = $('bar-metric').value, share = key === 'attention' || key === 'kv';
  const rows = B.rows.filter((row) => figure(row, key) !== null);
  const bar = 26, gap = 20, name = 210, width = 640;
  const most = Math.max(1e-9, ...rows.map((row) => figure(row, key)));
  let y = 0;
  const parts = [];
  for (const load of loads) {
    parts.push(svg('text', {x: 0, y: y + 16, class: 'value'}, load));
    y += 24;
    for (const row of rows.filter((r) => r.load === load)) {
      const value = figure(row, key), n = key.includes('.') ? row[key.split('.')[0]].n : row.completed;
      parts.push(svg('text', {x: name - 10, y: y + 16, 'text-anchor': 'end'}, row.policy),
          svg('rect', {x: name, y: y + 2, width: width * value / most, height: bar - 6, rx: 2, fill: colour(row.policy)}),
          svg('text', {x: name + width * value / most + 8, y: y + 16, class: 'value'},
              `${share ? percent(value) : number(value)} (n ${n})`));
      y += bar;
    }
    y += gap;
  }
  const root = svg('svg', {viewBox: `0 0 ${W} ${Math.max(y, 30)}`, role: 'img', 'aria-label': 'policies side by side'});
  root.append(...parts);
  $('bar-plot').replaceChildren(root);
}

drawFacts();
drawRows();
choices($('sweep-x'), Object.entries(RATES).filter(([key]) => B.rows.some((row) => row[key] !== null)), drawSweep);
choices($('sweep-y'), statChoices, drawSweep);
choices($('curve-metric'), Object.entries(LATENCIES), drawCurves);
choices($('curve-load'), [['*', 'all'], ...loads.map((load) => [load, load])], drawCurves);
choices($('bar-metric'), [...Object.entries(RATES).filter(([key]) => B.rows.some((row) => row[key] !== null)),
  ...statChoices.map(([key, title]) => [key, title + ', ms']), ['attention', 'attention, of dense'], ['kv', 'kv cache kept']], drawBars);
$('curve-log').addEventListener('change', drawCurves);
$('bar-metric').value = 'ttft.p50';
$('sweep').hidden = loads.length < 2;
$('bars').hidden = policies.length < 2;
drawSweep();
drawCurves();
drawBars();
