"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const shown = data.runs.map(() => true);
  const tip = document.getElementById("tip");
  const control = (id) => document.getElementById(id);
  const all = data.sections.flatMap((section) => section.charts.flatMap((chart) => chart.series));
  const ends = [0, 1].map((axis) => Math.max(1, ...all.flatMap((s) => s.points.map((p) => p[axis]))));
  const W = 420, H = 190, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 22;

  const color = (run) => `var(--run${run % 8})`;
  const svg = (tag, attributes, parent) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (parent) parent.appendChild(node);
    return node;
  };

  function text(value) {
    if (value === null || !isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
    if (size !== 0 && size < 1e-3) return value.toExponential(1);
    return String(+value.toPrecision(4));
  }

  function niceTicks(low, high, count) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const ticks = [];
    for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) {
      ticks.push(Math.abs(tick) < step * 1e-6 ? 0 : tick);
    }
    return ticks;
  }

  function logTicks(low, high) {
    const ticks = [];
    const first = Math.floor(low), last = Math.ceil(high);
    const step = Math.max(1, Math.ceil((last - first) / 5));
    for (let power = first; power <= last; power += step) ticks.push(power);
    const inside = ticks.filter((t) => t >= low - 1e-9 && t <= high + 1e-9);
    return inside.length > 1 ? inside : niceTicks(low, high, 3);
  }

  // The mean over a window, centred if possible; points without a value stay without.
  function smoothed(values, half) {
    if (!half) return values;
    return values.map((value, i) => {
      if (value === null) return null;
      const reach = Math.min(half, i, values.length - 1 - i);
      const part = values.slice(i - reach, i + reach + 1).filter((v) => v !== null);
      return part.reduce((a, b) => a + b, 0) / part.length;
    });
  }

  // The mean of the values that share a place or are less than `reach` before it: episodes that end
  // at the same frame make one place of the curve.
  function meanOver(xs, values, reach) {
    return xs.map((x) => {
      const part = values.filter((v, j) => v !== null && (xs[j] === x || (xs[j] < x && xs[j] > x - reach)));
      return part.length ? part.reduce((a, b) => a + b, 0) / part.length : null;
    });
  }

  // One point for each place: several rows may have the same frame.
  function merged(points, axis, band) {
    const places = new Map();
    points.forEach((point, i) => {
      const at = places.get(point[axis]) || places.set(point[axis], { values: [], band: null }).get(point[axis]);
      if (point[2] !== null) at.values.push(point[2]);
      if (band) at.band = band[i];
    });
    const rows = [...places.values()];
    const raw = rows.map(({ values }) => values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
    return { xs: [...places.keys()], raw, band: band && rows.map((row) => row.band) };
  }

  function path(xs, ys) {
    let out = "", open = false;
    xs.forEach((x, i) => {
      if (ys[i] === null) { open = false; return; }
      out += `${open ? "L" : "M"}${x.toFixed(1)} ${ys[i].toFixed(1)}`;
      open = true;
    });
    return out;
  }

  function draw(figure) {
    const chart = data.sections[figure.dataset.section].charts[figure.dataset.chart];
    const axis = +control("axis").value, half = +control("smooth").value;
    const plot = figure.querySelector(".plot");
    plot.replaceChildren();
    const series = chart.series.filter((s) => shown[s.run]).map((s) => {
      if (chart.dots) {
        const xs = s.points.map((p) => p[axis]), raw = s.points.map((p) => p[2]);
        return { run: s.run, xs, raw, ys: meanOver(xs, raw, ends[axis] * (5 + half) / 100) };
      }
      const { xs, raw, band } = merged(s.points, axis, s.band);
      return { run: s.run, xs, raw, band, ys: smoothed(raw, half) };
    });
    const every = series.flatMap((s) => s.raw.concat(
      s.band ? s.raw.flatMap((v, i) => v === null ? [] : [v - s.band[i], v + s.band[i]]) : []
    )).filter((v) => v !== null);
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": chart.name }, plot);
    if (!every.length) {
      svg("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, root).textContent = "nothing to show";
      return;
    }
    const least = Math.min(...every), most = Math.max(...every), scale = control("scale").value;
    const logarithmic = least > 0 && (scale === "log" || (scale === "auto" && most > 20 * least));
    const scaled = (v) => (logarithmic ? Math.log10(v) : v);
    let low = scaled(least), high = scaled(most);
    if (!logarithmic && low > 0 && low < 0.4 * high) low = 0;
    const pad = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    high += pad;
    if (logarithmic || low !== 0) low -= pad;
    const right = ends[axis];
    const X = (x) => LEFT + (x / right) * (W - LEFT - RIGHT);
    const Y = (v) => H - BOTTOM - ((scaled(v) - low) / (high - low)) * (H - TOP - BOTTOM);
    for (const tick of logarithmic ? logTicks(low, high) : niceTicks(low, high, 4)) {
      const value = logarithmic ? 10 ** tick : tick, y = Y(value);
      svg("line", { class: "rule", x1: LEFT, x2: W - RIGHT, y1: y, y2: y }, root);
      svg("text", { x: LEFT - 6, y: y + 3.5, "text-anchor": "end" }, root).textContent = text(value);
    }
    for (const tick of niceTicks(0, right, 5)) {
      svg("text", { x: X(tick), y: H - 6, "text-anchor": "middle" }, root).textContent = text(tick);
    }
    for (const s of series) drawSeries(root, s, X, Y, half, logarithmic, chart.dots);
    follow(root, series, X, Y, right, axis);
  }

  function drawSeries(root, s, X, Y, half, logarithmic, dots) {
    const xs = s.xs.map(X);
    const at = (values) => values.map((v) => (v === null ? null : Y(v)));
    const stroke = color(s.run);
    if (s.band && !half && !logarithmic) {
      const known = s.raw.map((v, i) => i).filter((i) => s.raw[i] !== null && s.band[i] !== null);
      const upper = known.map((i) => `${xs[i].toFixed(1)} ${Y(s.raw[i] + s.band[i]).toFixed(1)}`);
      const lower = known.map((i) => `${xs[i].toFixed(1)} ${Y(s.raw[i] - s.band[i]).toFixed(1)}`);
      const d = `M${upper.concat(lower.reverse()).join("L")}Z`;
      if (known.length > 1) svg("path", { d, style: `fill:${stroke};opacity:0.15` }, root);
    }
    if (dots) {
      s.raw.forEach((v, i) => {
        const place = { cx: xs[i], cy: v === null ? 0 : Y(v), r: 2.2 };
        if (v !== null) svg("circle", { ...place, style: `fill:${stroke};opacity:0.4` }, root);
      });
    } else if (half) svg("path", { class: "raw", d: path(xs, at(s.raw)), style: `stroke:${stroke}` }, root);
    svg("path", { class: "curve", d: path(xs, at(s.ys)), style: `stroke:${stroke}` }, root);
    if (s.xs.length <= 24 && !dots) {
      s.ys.forEach((v, i) => {
        if (v !== null) svg("circle", { cx: xs[i], cy: Y(v), r: 2.6, style: `fill:${stroke}` }, root);
      });
    }
  }

  // The value of every run at the pointer.
  function follow(root, series, X, Y, right, axis) {
    const cursor = svg("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" }, root);
    const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
    root.addEventListener("pointerleave", hide);
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - RIGHT) * right;
      if (x < 0 || x > right) { hide(); return; }
      const lines = [];
      let snapped = null;
      for (const s of series) {
        let best = -1;
        s.xs.forEach((value, i) => {
          if (s.ys[i] !== null && (best < 0 || Math.abs(value - x) < Math.abs(s.xs[best] - x))) best = i;
        });
        if (best < 0) continue;
        if (snapped === null || Math.abs(s.xs[best] - x) < Math.abs(snapped - x)) snapped = s.xs[best];
        lines.push([s.run, s.ys[best], s.band ? s.band[best] : null]);
      }
      if (!lines.length) { hide(); return; }
      cursor.setAttribute("x1", X(snapped));
      cursor.setAttribute("x2", X(snapped));
      cursor.setAttribute("visibility", "visible");
      const head = document.createElement("b");
      head.textContent = `${snapped.toLocaleString("en")} ${axis ? "updates" : "frames"}`;
      tip.replaceChildren(head, ...lines.map(([run, value, band]) => {
        const row = document.createElement("div"), name = document.createElement("span");
        const dot = document.createElement("i"), number = document.createElement("span");
        dot.className = `dot run${run % 8}`;
        name.append(dot, data.runs[run]);
        number.textContent = text(value) + (band ? ` ± ${text(band)}` : "");
        row.append(name, number);
        return row;
      }));
      tip.hidden = false;
      const size = tip.getBoundingClientRect();
      const left = event.clientX + 16 + size.width > innerWidth ? event.clientX - 16 - size.width : event.clientX + 16;
      tip.style.left = `${Math.max(4, left)}px`;
      tip.style.top = `${Math.min(event.clientY + 14, innerHeight - size.height - 4)}px`;
    });
  }

  const figures = [...document.querySelectorAll("figure.chart")];
  const visible = new Set();
  const stale = new Set(figures);
  const refresh = (figure) => { if (stale.delete(figure)) draw(figure); };
  const redraw = () => { figures.forEach((f) => stale.add(f)); visible.forEach(refresh); };
  // Draw only visible charts: a run has hundreds of metrics.
  const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting) { visible.add(entry.target); refresh(entry.target); }
    else visible.delete(entry.target);
  }), { rootMargin: "400px" });
  figures.forEach((figure) => watcher.observe(figure));
  figures.slice(0, 12).forEach(refresh);
  addEventListener("beforeprint", () => figures.forEach(refresh));

  // A video plays while it is visible, unless the user prefers reduced motion or has paused it.
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const player = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
    if (isIntersecting && !target.dataset.stopped) target.play().catch(() => {});
    else if (!isIntersecting) { if (!target.paused) target.dataset.leaving = "1"; target.pause(); }
  }), { threshold: 0.5 });
  document.querySelectorAll("video").forEach((video) => {
    video.addEventListener("pause", () => {
      if (!video.dataset.leaving) video.dataset.stopped = "1";
      delete video.dataset.leaving;
    });
    video.addEventListener("play", () => delete video.dataset.stopped);
    if (!still) player.observe(video);
  });

  ["smooth", "axis", "scale"].forEach((id) => control(id).addEventListener("input", redraw));
  control("controls").addEventListener("submit", (event) => event.preventDefault());
  control("search").addEventListener("input", () => {
    const wanted = control("search").value.trim().toLowerCase();
    document.querySelectorAll("details.section").forEach((section) => {
      let found = 0;
      section.querySelectorAll("figure.chart").forEach((figure) => {
        const match = figure.dataset.name.toLowerCase().includes(wanted);
        figure.hidden = !match;
        found += match;
      });
      section.hidden = !found;
      if (wanted && found) section.open = true;
    });
  });
  document.querySelectorAll(".chip").forEach((chip) => chip.addEventListener("click", () => {
    const run = +chip.dataset.run;
    shown[run] = !shown[run];
    chip.setAttribute("aria-pressed", shown[run]);
    redraw();
  }));
})();
