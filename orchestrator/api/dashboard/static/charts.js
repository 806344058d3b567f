// Lines by uPlot, in the page's own colours: drawn again when the width or the colours change.

const HUES = ["--running", "--partial", "--succeeded", "--failed", "--paused", "--cancelled", "--queued", "--accent"];
const drawn = new Map();

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(extra) {
  const grid = { stroke: colour("--line"), width: 1 };
  return { stroke: colour("--dim"), grid, ticks: grid, ...extra };
}

// `series`: [{label, values}], all over the same `xs`; `time`: the xs are Unix seconds, a minute of
// them at least; `low`, `high`: what the other axis reaches to in any case.
export function lines(holder, xs, series, { time = false, height = 200, low = null, high = null } = {}) {
  drawn.set(holder, { xs, series, time, height, low, high });
  draw(holder);
}

function draw(holder) {
  const { xs, series, time, height, low, high } = drawn.get(holder);
  const all = series.flatMap((each) => each.values).filter((each) => each !== null);
  const least = Math.min(...all, low ?? Infinity), most = Math.max(...all, high ?? -Infinity);
  const room = (most - least || 1) * 0.06;
  const options = {
    width: Math.max(200, holder.clientWidth),
    height,
    legend: { show: series.length > 1, live: false },
    cursor: { y: false },
    scales: {
      x: time ? { time, range: [xs[0], Math.max(xs[0] + 60, xs.at(-1))] } : { time },
      y: { range: [least === low ? low : least - room, most + room] },
    },
    axes: [axis({ space: time ? 90 : 50 }), axis({ size: 56 })],
    series: [
      {},
      ...series.map((each, place) => ({
        label: each.label, stroke: colour(HUES[place % HUES.length]), width: 2, spanGaps: true,
        points: { show: !time, size: 6 },
      })),
    ],
  };
  holder.replaceChildren();
  new uPlot(options, [xs, ...series.map((each) => each.values)], holder);
}

function drawAll() {
  for (const holder of drawn.keys()) {
    if (holder.isConnected) draw(holder);
    else drawn.delete(holder);
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) drawAll();
  width = innerWidth;
});
