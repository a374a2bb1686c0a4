// Curves by uPlot: live ones over one event stream a page, and fixed ones from a page's own data.

import { listen, renew } from "./live.js";

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// light-dark() is resolved only where a colour is used, so a hidden element is asked for the colour itself.
const probe = document.createElement("i");
probe.hidden = true;
document.body.append(probe);
function colour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

const SERIES = ["--accent", "--area-c", "--warn", "--area-b", "--bad", "--area-a"];
const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const compact = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, notation: "compact" });
const figure = (value) => (value == null ? "–" : Math.abs(value) > 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : Math.abs(value) < 1e5 ? plain.format(value).replaceAll(",", "\u202f") : compact.format(value));

// Draws `data` ([[x…], [y…], …]) into `box`; redraws on a new width and on a new theme.
function curve(box, { labels, xLabel, log = false, logX = false, yLabel = "", dots = false, marks = () => [] }) {
  let plot = null;
  let data = [[], ...labels.map(() => [])];
  const axis = () => ({ stroke: colour("--text-2"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 }, font: `12px ${style("--sans")}` });
  function draw() {
    plot?.destroy();
    const options = {
      width: box.clientWidth, height: 190, cursor: { points: { size: 7 }, sync: box.dataset.sync ? { key: box.dataset.sync } : undefined },
      scales: { x: { time: false, distr: logX ? 3 : 1, ...(logX && { range: (_, low, high) => uPlot.rangeLog(low, high, 10, false) }) }, y: { distr: log ? 3 : 1 } },
      axes: [{ ...axis(), values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : figure(tick))) }, { ...axis(), size: 56, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : figure(tick))) }],
      series: [
        { label: xLabel, value: (_, value) => figure(value) },
        ...labels.map((label, index) => ({ label, stroke: colour(SERIES[index % SERIES.length]), width: 1.75, spanGaps: true, points: { show: dots }, value: (_, value) => figure(value) })),
      ],
      hooks: { draw: [(drawn) => drawMarks(drawn, marks())] },
    };
    plot = new uPlot(options, data, box);
  }
  new ResizeObserver(() => plot && plot.setSize({ width: box.clientWidth, height: 190 })).observe(box);
  document.addEventListener("sihe:theme", () => plot && draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plot && draw());
  return { set(next) { data = next; if (plot) plot.setData(data); else draw(); } };
}

function drawMarks(plot, steps) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.strokeStyle = colour("--bad");
  ctx.setLineDash([4, 4]);
  for (const step of steps) {
    const x = Math.round(plot.valToPos(step, "x", true));
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
  }
  ctx.restore();
}

// ---- a run's live curves --------------------------------------------------------------------------------------------
function follow(root) {
  const { stream, xLabel } = root.dataset;
  const values = new Map(); // metric -> Map(step -> value): a step that is repeated after a recovery replaces itself
  const charts = new Map();
  let restarts = [];
  const boxes = new Map([...root.querySelectorAll("[data-metric]")].map((box) => [box.dataset.metric, box]));

  function boxFor(metric) {
    if (!boxes.has(metric)) { // a metric that appeared after the page was made
      const card = document.getElementById("chart-template").content.firstElementChild.cloneNode(true);
      card.querySelector("h3").textContent = metric;
      const box = card.querySelector(".chart");
      box.dataset.metric = metric;
      root.append(card);
      boxes.set(metric, box);
    }
    return boxes.get(metric);
  }
  function draw(metric) {
    const points = [...values.get(metric)].sort((a, b) => a[0] - b[0]);
    if (points.length < 2) return;
    if (!charts.has(metric)) charts.set(metric, curve(boxFor(metric), { labels: [boxFor(metric).dataset.label ?? metric], xLabel, marks: () => restarts }));
    charts.get(metric).set([points.map((point) => point[0]), points.map((point) => point[1])]);
    const last = boxFor(metric).closest(".card").querySelector("[data-last]");
    if (last) last.textContent = figure(points.at(-1)[1]);
  }
  listen(stream, {
    status: renew,
    curves({ whole, series, restarts: at }) {
      restarts = at;
      if (whole) values.clear();
      for (const [metric, [steps, measured]] of Object.entries(series)) {
        if (!values.has(metric)) values.set(metric, new Map());
        steps.forEach((step, index) => values.get(metric).set(step, measured[index]));
        draw(metric);
      }
    },
  });
}

// ---- a deployment's last minutes: one line an arm ----------------------------------------------------------------------
function watchTraffic(root) {
  const charts = new Map();
  listen(root.dataset.traffic, {
    status: renew,
    samples({ arms, seconds, series }) {
      for (const box of root.querySelectorAll("[data-measure]")) {
        const measure = box.dataset.measure;
        const key = arms.join(" ");
        if (charts.get(measure)?.key !== key) {
          box.replaceChildren();
          charts.set(measure, { key, plot: curve(box, { labels: arms, xLabel: root.dataset.xLabel }) });
        }
        charts.get(measure).plot.set([seconds, ...arms.map((arm) => series[measure][arm])]);
      }
    },
  });
}

// ---- charts whose data stand in the page ------------------------------------------------------------------------------
function still(figureElement) {
  const box = figureElement.querySelector(".chart");
  if (box.dataset.drawn) return;
  box.dataset.drawn = "yes";
  const { data, ...options } = JSON.parse(figureElement.querySelector('script[type="application/json"]').textContent);
  curve(box, { dots: true, ...options }).set(data);
}

function start(root) {
  for (const element of root.querySelectorAll("[data-stream]")) follow(element);
  for (const element of root.querySelectorAll("[data-traffic]")) watchTraffic(element);
  for (const element of root.querySelectorAll("figure[data-chart]")) still(element);
}
start(document);
document.addEventListener("htmx:after:swap", () => { for (const element of document.querySelectorAll("figure[data-chart]")) still(element); });
