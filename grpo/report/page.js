// Draws the report from the JSON in the page. Whatever comes from a run is untrusted: it reaches the page as text nodes
// and numbers only, never as markup.
"use strict";
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main"), tip = document.getElementById("tip");
  main.textContent = "";

  // ---------------------------------------------------------------- small helpers
  function h(tag, attrs, ...children) {
    const svg = h.svg.has(tag);
    const e = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [k, v] of Object.entries(attrs || {})) {
      if (v == null || v === false) continue;
      if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
      else if (k === "css") Object.entries(v).forEach(([p, x]) => e.style.setProperty(p, x));
      else e.setAttribute(k, v === true ? "" : v);
    }
    for (const c of children.flat(9)) if (c != null && c !== false) e.append(c instanceof Node ? c : String(c));
    return e;
  }
  h.svg = new Set(["svg", "g", "path", "line", "text", "rect", "clipPath", "circle"]);
  let ids = 0;

  function num(v, digits = 3) {
    if (v == null) return "–";
    const a = Math.abs(v);
    if (a >= 1e6) return (v / 1e6).toFixed(1) + " M";
    if (a >= 1e4) return Math.round(v).toLocaleString("en");
    if (a >= 100 || Number.isInteger(v)) return String(+v.toFixed(1));
    if (a !== 0 && a < 0.001) return v.toExponential(1);
    return v.toFixed(a >= 10 ? 1 : digits);
  }
  const signed = (v) => (v > 0 ? "+" : v < 0 ? "−" : "") + num(Math.abs(v));
  const short = (name) => D.names[name] || name.replace(/^rewards\//, "").replace(/\/mean$/, "");
  const colour = (i) => `var(--c${i % 8})`, dash = (i) => ["", "6 3", "2 3", "8 3 2 3"][Math.floor(i / 8) % 4];

  function swatch(i) {
    return h("svg", {class: "swatch", viewBox: "0 0 24 12", "aria-hidden": "true"},
      h("line", {x1: 1, x2: 23, y1: 6, y2: 6, stroke: colour(i), "stroke-width": 2.5, "stroke-dasharray": dash(i)}));
  }
  function showTip(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    const r = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - r.width - 8)) + "px";
    tip.style.top = Math.max(4, event.clientY + 18 + r.height > innerHeight ? event.clientY - r.height - 12 : event.clientY + 18) + "px";
  }
  const hideTip = () => { tip.hidden = true; };

  function section(id, title, ...children) {
    const s = h("section", {id}, h("h2", {}, title), children);
    main.append(s);
    document.getElementById("nav").append(h("a", {href: "#" + id}, title));
    return s;
  }

  // A table whose columns sort by a click. Cells: {v: value to sort by, c: what to show, text: left-aligned}.
  function table(heads, rows) {
    const body = h("tbody");
    const fill = (list) => body.replaceChildren(...list.map((r) =>
      h("tr", {}, r.map((cell, i) => h("td", {class: heads[i].text ? "text" : null}, cell.c ?? num(cell.v))))));
    const ths = heads.map((head, i) => h("th", {class: head.text ? "text" : null, scope: "col", tabindex: 0, title: head.title, onclick: () => sort(i),
      onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); sort(i); } }}, head.name));
    function sort(i) {
      const up = ths[i].getAttribute("aria-sort") === "descending";
      ths.forEach((t) => t.removeAttribute("aria-sort"));
      ths[i].setAttribute("aria-sort", up ? "ascending" : "descending");
      fill([...rows].sort((a, b) => {
        const x = a[i].v, y = b[i].v;
        if (x == null || y == null) return (x == null) - (y == null);
        const d = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", {numeric: true});
        return up ? d : -d;
      }));
    }
    fill(rows);
    return h("div", {class: "scroll"}, h("table", {}, h("thead", {}, h("tr", {}, ths)), body));
  }

  // ---------------------------------------------------------------- head and findings
  document.getElementById("sub").textContent = D.subtitle;

  const troubles = D.runs.filter((r) => r.failure || r.problems.length || r.state === "stopped" || r.state === "unreadable");
  const sick = D.runs.flatMap((r) => r.findings.map((f) => ({run: r, ...f})));
  section("findings", "What to look at",
    !sick.length && !troubles.length && h("p", {class: "quiet"}, "No known sickness shows in these curves, and every folder could be read."),
    h("ul", {class: "findings"},
      troubles.map((r) => h("li", {class: "trouble"}, h("b", {}, r.name), ` is ${r.state}. `, r.failure ? r.failure + " " : "", r.problems.join("; "))),
      sick.map((f) => h("li", {}, h("b", {}, f.run.name), f.run.label ? ` (${f.run.label})` : "", `: ${f.text}.`, h("div", {class: "sub"}, `Try: ${f.advice}.`)))));

  // ---------------------------------------------------------------- tables
  const texts = (values) => values.map((v) => ({v, c: v === "" ? "–" : v}));
  const heads = (columns) => columns.map((name) => ({name, text: true}));
  const figureHeads = D.figures.map((m) => ({name: short(m), title: m}));
  const averaged = D.figures.filter((m) => !["steps", "accuracy/best_step"].includes(m));  // nobody asks for their mean

  if (D.settings.length) {
    const columns = D.columns.filter((c) => c !== "seed");
    const label = columns.length ? heads(columns) : [{name: "setting", text: true}];
    section("settings", "Settings",
      h("p", {class: "sub"}, D.settingsNote),
      table([{name: ""}, ...label, {name: "seeds"}, ...averaged.map((m) => ({name: short(m), title: m}))], D.settings.map((s, i) => [
        {v: i, c: swatch(i)}, ...texts(columns.length ? s.values : [s.label]), {v: s.runs.length, c: s.state ? `${s.runs.length} (${s.state})` : s.runs.length},
        ...averaged.map((m) => {
          const e = s.estimates[m];
          return e ? {v: e[0], c: h("span", {}, num(e[0]), e[1] == null ? "" : h("span", {class: "half"}, " ± " + num(e[1])))} : {v: null, c: "–"};
        })])));
  }
  if (D.paired.length) {
    const reach = Math.max(...D.paired.map((p) => Math.min(Math.abs(p.mean) + (p.half || 0), 3 * Math.abs(p.mean) + 0.2)), 0.01);
    const plot = (p) => {  // an interval that goes on beyond the scale ends in an arrow
      const x = (v) => 100 + 92 * Math.max(-1, Math.min(1, v / reach)), low = p.mean - p.half, high = p.mean + p.half;
      return h("svg", {viewBox: "0 0 200 16", width: 200, height: 16, role: "img", "aria-label": "interval"},
        h("line", {class: "axis", x1: 100, x2: 100, y1: 1, y2: 15, opacity: 0.45}),
        p.half != null && [h("line", {class: "axis", x1: x(low), x2: x(high), y1: 8, y2: 8}),
          low < -reach && h("path", {class: "arrow", d: "M8 4.5L2 8L8 11.5Z"}), high > reach && h("path", {class: "arrow", d: "M192 4.5L198 8L192 11.5Z"})],
        h("circle", {cx: x(p.mean), cy: 8, r: 3.4, fill: colour(p.setting)}));
    };
    section("paired", "Against the baseline",
      h("p", {class: "sub"}, D.pairedNote),
      table([{name: ""}, {name: "setting", text: true}, {name: "figure", text: true}, {name: "difference"}, {name: "95 % interval"}, {name: "n"}, {name: `−${num(reach)} … +${num(reach)}`}],
        D.paired.map((p) => [{v: p.setting, c: swatch(p.setting)}, {v: p.label}, {v: short(p.metric)}, {v: p.mean, c: signed(p.mean)},
          {v: p.half, c: p.half == null ? "one pair: none" : `${signed(p.mean - p.half)} to ${signed(p.mean + p.half)}`}, {v: p.n}, {v: p.mean, c: plot(p)}])
          .map((row) => row.map((c) => (typeof c.v === "string" && c.c == null ? {...c, c: c.v} : c)))));
  }

  // ---------------------------------------------------------------- curves
  function points(run, metric) {
    const c = D.curves[run];
    if (c.own[metric]) return c.own[metric][0].map((x, i) => [x, c.own[metric][1][i]]);
    const y = c.m[metric];
    return y ? c.x.map((x, i) => [x, y[i]]).filter((p) => p[1] != null) : [];
  }
  function smooth(pts, width) {
    if (width < 2) return pts;
    return pts.map((p, i) => {
      const part = pts.slice(Math.max(0, i - width + 1), i + 1);
      return [p[0], part.reduce((s, q) => s + q[1], 0) / part.length];
    });
  }
  function series(metric, mode, width) {
    if (mode === "runs") return D.runs.map((r, i) => ({label: r.label || r.name, at: r.setting, key: r.setting, pts: smooth(points(i, metric), width)})).filter((s) => s.pts.length && s.at != null);
    return D.settings.map((s, i) => {
      const at = new Map();
      const members = s.runs.map((r) => smooth(points(r, metric), width)).filter((p) => p.length);
      for (const pts of members) for (const [x, y] of pts) at.has(x) ? at.get(x).push(y) : at.set(x, [y]);
      const kept = [...at].filter(([, v]) => v.length * 2 >= members.length).sort((a, b) => a[0] - b[0]);
      return {label: s.label, at: i, key: i, n: members.length, pts: kept.map(([x, v]) => [x, v.reduce((a, b) => a + b, 0) / v.length]),
        band: members.length > 1 && kept.map(([x, v]) => [x, Math.min(...v), Math.max(...v)])};
    }).filter((s) => s.pts.length);
  }
  function ticks(low, high, n) {
    const raw = (high - low) / n || 1, mag = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * mag).find((s) => s >= raw);
    const out = [];
    for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9 && out.length < 12; t += step) out.push(+t.toPrecision(12));
    return out;
  }
  function label(t) {  // of a tick: as many digits as tell it from its neighbours
    const a = Math.abs(t), whole = (v) => String(+v.toPrecision(6));
    return a >= 1e6 ? whole(t / 1e6) + " M" : a >= 1e4 ? t.toLocaleString("en") : whole(t);
  }
  function chart(metric, mode, width) {
    const all = series(metric, mode, width), W = 340, H = 190, L = 50, R = 8, T = 8, B = 22;
    if (!all.length) return null;
    const ys = all.flatMap((s) => s.band ? s.band.flatMap((b) => [b[1], b[2]]) : s.pts.map((p) => p[1])).sort((a, b) => a - b);
    let low = ys[0], high = ys[ys.length - 1], note = "";
    const most = ys[Math.floor(0.985 * (ys.length - 1))];
    if (low >= 0 && most > 0 && high > 4 * most) { note = `peak ${num(high)}`; high = 1.25 * most; }
    if (metric === "accuracy/heldout" && D.chance != null) { low = Math.min(low, D.chance); high = Math.max(high, D.chance); }
    if (high - low < 1e-12) { const pad = Math.abs(high) * 0.05 || 0.05; low -= low === 0 ? 0 : pad; high += pad; }
    const room = 0.06 * (high - low);
    if (low !== 0) low -= room;
    high += room;
    let x0 = Infinity, x1 = -Infinity;
    for (const s of all) { x0 = Math.min(x0, s.pts[0][0]); x1 = Math.max(x1, s.pts[s.pts.length - 1][0]); }
    if (x0 === x1) x1 = x0 + 1;
    const X = (v) => L + (W - L - R) * (v - x0) / (x1 - x0), Y = (v) => H - B - (H - B - T) * (v - low) / (high - low);
    const f = (v) => v.toFixed(1), clip = "clip" + ids++;
    const path = (pts) => pts.map((p, i) => (i ? "L" : "M") + f(X(p[0])) + " " + f(Y(p[1]))).join("");
    const cross = h("line", {class: "cross", y1: T, y2: H - B, visibility: "hidden"});
    const svg = h("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": metric},
      h("clipPath", {id: clip}, h("rect", {x: L, y: T, width: W - L - R, height: H - B - T})),
      ticks(low, high, 6).map((t) => [h("line", {class: "grid", x1: L, x2: W - R, y1: f(Y(t)), y2: f(Y(t))}), h("text", {x: L - 6, y: f(Y(t) + 3.5), "text-anchor": "end"}, label(t))]),
      ticks(x0, x1, 5).map((t) => h("text", {x: f(X(t)), y: H - 7, "text-anchor": "middle"}, num(t, 0))),
      metric === "accuracy/heldout" && D.chance != null && [h("line", {class: "cross", x1: L, x2: W - R, y1: f(Y(D.chance)), y2: f(Y(D.chance))}), h("text", {x: W - R, y: f(Y(D.chance) - 4), "text-anchor": "end"}, "chance")],
      h("g", {"clip-path": `url(#${clip})`},
        all.filter((s) => s.band).map((s) => h("path", {class: "band", "data-key": s.key, fill: colour(s.at),
          d: path([...s.band.map((b) => [b[0], b[2]]), ...[...s.band].reverse().map((b) => [b[0], b[1]])]) + "Z"})),
        all.map((s) => h("path", {class: "line", "data-key": s.key, stroke: colour(s.at), "stroke-dasharray": dash(s.at), d: path(s.pts)})),
        all.filter((s) => s.pts.length < 30 && all.length < 12).map((s) => s.pts.map((p) => h("circle", {class: "dot", "data-key": s.key, cx: f(X(p[0])), cy: f(Y(p[1])), r: 1.9, fill: colour(s.at)})))),
      h("line", {class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B}), cross);
    svg.addEventListener("pointermove", (e) => {
      const box = svg.getBoundingClientRect(), at = x0 + ((e.clientX - box.left) / box.width * W - L) / (W - L - R) * (x1 - x0);
      const near = (pts) => { let lo = 0, hi = pts.length - 1; while (hi - lo > 1) { const m = (lo + hi) >> 1; pts[m][0] < at ? lo = m : hi = m; } return Math.abs(pts[lo][0] - at) < Math.abs(pts[hi][0] - at) ? lo : hi; };
      const step = all.map((s) => s.pts[near(s.pts)][0]).reduce((a, b) => Math.abs(b - at) < Math.abs(a - at) ? b : a);
      const here = all.map((s) => ({s, p: s.pts[near(s.pts)], b: s.band && s.band[near(s.pts)]})).filter((o) => o.p[0] === step).sort((a, b) => b.p[1] - a.p[1]);
      cross.setAttribute("x1", f(X(step))); cross.setAttribute("x2", f(X(step))); cross.setAttribute("visibility", "visible");
      showTip(e, [`step ${step}`, ...here.slice(0, 12).map((o) => `${num(o.p[1], 4)}${o.b ? ` (${num(o.b[1])} to ${num(o.b[2])})` : ""}  ${o.s.label.slice(0, 80)}`), here.length > 12 ? `and ${here.length - 12} more` : ""].filter(Boolean).join("\n"));
    });
    svg.addEventListener("pointerleave", () => { hideTip(); cross.setAttribute("visibility", "hidden"); });
    return h("div", {class: "chart"}, h("div", {class: "name"}, h("h3", {title: metric}, short(metric)), h("span", {class: "sub"}, note)), svg);
  }

  if (D.metrics.length && D.settings.length) {
    let mode = D.settings.some((s) => s.runs.length > 1) ? "settings" : "runs", width = 1, everything = false, chosen = null;
    const grid = h("div", {class: "charts"}), legend = h("div", {class: "legend"});
    const mark = () => {
      grid.querySelectorAll("[data-key]").forEach((e) => e.classList.toggle("dim", chosen != null && e.getAttribute("data-key") !== String(chosen)));
      legend.querySelectorAll("button").forEach((b, i) => b.setAttribute("aria-pressed", String(chosen === i)));
    };
    const draw = () => { grid.replaceChildren(...(everything ? D.metrics : D.metrics.slice(0, D.shown)).map((m) => chart(m, mode, width)).filter(Boolean)); mark(); };
    legend.append(...D.settings.map((s, i) => h("button", {type: "button", "aria-pressed": "false", onclick: () => { chosen = chosen === i ? null : i; mark(); }}, swatch(i), s.label)));
    const modes = [["settings", "Mean of seeds"], ["runs", "Each run"]].map(([m, text]) => h("button", {type: "button", "aria-pressed": String(m === mode), onclick: () => { mode = m; modes.forEach((b, i) => b.setAttribute("aria-pressed", String((i ? "runs" : "settings") === m))); draw(); }}, text));
    section("curves", "Curves",
      h("p", {class: "sub"}, D.curvesNote),
      h("div", {class: "bar"}, modes,
        h("label", {}, "Smooth over", h("select", {"aria-label": "smoothing", onchange: (e) => { width = +e.target.value; draw(); }}, [[1, "nothing"], [5, "5 points"], [15, "15 points"]].map(([v, t]) => h("option", {value: v}, t)))),
        D.metrics.length > D.shown && h("button", {type: "button", "aria-pressed": "false", onclick: (e) => { everything = !everything; e.currentTarget.setAttribute("aria-pressed", String(everything)); draw(); }}, `All ${D.metrics.length} metrics`)),
      legend, grid);
    draw();
  }

  // ---------------------------------------------------------------- samples
  const TAG = /<(\/?)(think|semantic_elements|answer)>/g;
  // [start, end, class] of a completion: a block is an opening tag whose next tag is its own closing tag.
  function regions(text) {
    const marks = [...text.matchAll(TAG)], out = marks.map((m) => [m.index, m.index + m[0].length, "tag"]);
    for (let i = 0; i + 1 < marks.length; i++) {
      const a = marks[i], b = marks[i + 1];
      if (!a[1] && b[1] && a[2] === b[2]) out.push([a.index + a[0].length, b.index, a[2]]);
    }
    return out.filter((r) => r[1] > r[0]).sort((a, b) => a[0] - b[0]);
  }
  function shade(figures, i, by) {
    const v = figures[by] && figures[by][i];
    if (v == null) return null;
    if (by === "ratio" || by === "sampler") {
      const d = Math.log(Math.max(v, 1e-9)), a = Math.min(1, Math.abs(d) / 0.4);
      return `color-mix(in srgb, var(${d > 0 ? "--c1" : "--c0"}) ${Math.round(70 * a)}%, transparent)`;
    }
    return `color-mix(in srgb, var(--c3) ${Math.round(70 * Math.min(1, v / (by === "kl" ? 0.3 : 1.5)))}%, transparent)`;
  }
  function completion(row, by) {
    const fig = row.figures, text = fig ? fig.t.join("") : row.text, marks = regions(text), pre = h("pre", {class: "text"});
    const pieces = fig ? fig.t.map((t, i) => [t, i]) : [[text, null]];
    let at = 0, r = 0;
    for (const [piece, i] of pieces) {
      let from = at;
      const end = at + piece.length;
      while (from < end) {
        while (r < marks.length && marks[r][1] <= from) r++;
        const inside = r < marks.length && marks[r][0] <= from;
        const to = Math.min(end, r < marks.length ? marks[r][inside ? 1 : 0] : end);
        const kind = inside ? marks[r][2] : null;
        const colourOf = i != null && by ? shade(fig, i, by) : null;
        pre.append(i == null && !kind ? text.slice(from, to) : h("span", {class: [kind, i != null && "tok"].filter(Boolean).join(" "), "data-i": i, css: colourOf ? {background: colourOf} : null}, text.slice(from, to)));
        from = to;
      }
      at = end;
    }
    if (fig) {
      const names = [["ratio", "ratio π/π_old"], ["kl", "KL to the reference"], ["entropy", "entropy"], ["sampler", "π_old/π_sampler"], ["mask", "in the loss"]].filter(([k]) => fig[k]);
      pre.addEventListener("pointermove", (e) => {
        const i = e.target.dataset ? e.target.dataset.i : null;
        if (i == null) return hideTip();
        showTip(e, [JSON.stringify(fig.t[i]), ...names.map(([k, n]) => `${n}  ${k === "mask" ? (fig[k][i] ? "yes" : "no") : num(fig[k][i], 4)}`), `advantage  ${row.advantage == null ? "–" : signed(row.advantage)}`].join("\n"));
      });
      pre.addEventListener("pointerleave", hideTip);
    }
    return pre;
  }
  // How often each option was answered; nothing of older runs, whose samples do not say.
  const answers = (group) => group.choices.map((_, i) => group.rows.filter((row) => row.answered === i).length);

  if (D.groups.length || D.samplesNote) {
    const state = {run: "", step: "", kind: new Set(), text: "", at: 0, by: ""};
    const kinds = [["right", "Some right"], ["wrong", "Some wrong"], ["zero_variance", "Zero variance"], ["truncated", "Truncated"]];
    const list = h("div", {class: "list", role: "group", "aria-label": "questions"}), detail = h("div", {class: "detail"}), count = h("span", {class: "sub", id: "count"});
    const used = [...new Set(D.groups.map((g) => g.run))];
    let shown = [];
    const matches = (g) => (state.run === "" || g.run === +state.run) && (state.step === "" || g.step === +state.step) && [...state.kind].every((k) => g.flags[k])
      && (!state.text || (g.question + " " + g.gold + " " + g.id + " " + g.rows.map((r) => r.text).join(" ")).toLowerCase().includes(state.text));
    const dots = (g) => h("span", {class: "dots"}, g.rows.slice(0, 32).map((r) => h("span", {class: r.right ? "ok" : r.right === false ? "no" : "quiet"}, r.right ? "●" : r.right === false ? "○" : "·")));
    function filter() {
      shown = D.groups.filter(matches);
      state.at = 0;
      count.textContent = `${shown.length} of ${D.groups.length} questions`;
      list.replaceChildren(...shown.map((g, i) => h("button", {type: "button", "aria-pressed": String(i === 0), onclick: () => pick(i)},
        h("span", {class: "sub"}, `step ${g.step} · ${g.why.join(", ")}`, used.length > 1 ? ` · ${D.runs[g.run].label || D.runs[g.run].name}` : ""), h("span", {class: "q"}, g.question.slice(0, 300) || "(no question)"), dots(g))));
      if (!shown.length) list.append(h("div", {class: "empty"}, D.groups.length ? "Nothing fits these filters." : "No samples."));
      draw();
    }
    function pick(i) {
      if (!shown.length) return;
      state.at = Math.max(0, Math.min(shown.length - 1, i));
      [...list.children].forEach((b, k) => b.setAttribute("aria-pressed", String(k === state.at)));
      list.children[state.at].scrollIntoView({block: "nearest"});
      draw();
    }
    list.addEventListener("keydown", (e) => {
      const by = {ArrowDown: 1, ArrowUp: -1}[e.key];
      if (by) { e.preventDefault(); pick(state.at + by); list.children[state.at].focus(); }
    });
    function draw() {
      hideTip();
      const g = shown[state.at];
      if (!g) return detail.replaceChildren();
      const given = answers(g), run = D.runs[g.run];
      detail.replaceChildren(h("div", {},
        h("div", {class: "sub"}, `${run.name}${run.label ? ` (${run.label})` : ""} · step ${g.step} · ${g.id} · ${g.why.join(", ")}`),
        h("div", {class: "question"}, g.question || "(no question)"),
        g.clip != null ? h("audio", {controls: true, preload: "metadata", src: "data:audio/flac;base64," + D.clips[g.clip]}) : null,
        g.clipNote && h("div", {class: "sub clip-note"}, g.clipNote),
        h("ul", {class: "choices"}, g.choices.map((c, i) => h("li", {class: c === g.gold ? "gold" : null}, h("span", {class: "quiet"}, String.fromCharCode(65 + i % 26)), h("span", {}, c, c === g.gold && h("span", {class: "ok"}, "  ✓ gold")), h("span", {class: "n", title: "completions with this answer"}, given[i] || "")))),
        g.choices.includes(g.gold) ? null : h("p", {class: "sub"}, `Gold: ${g.gold || "unknown"}`),
        g.note && h("p", {class: "sub"}, g.note),
        g.flags.zero_variance && h("p", {class: "sub"}, "All completions earned the same: this group taught nothing."),
        g.rows.map((r, i) => h("article", {class: "card"},
          h("header", {},
            h("span", {}, `#${i + 1} `, r.right ? h("span", {class: "ok"}, "✓ right") : r.right === false ? h("span", {class: "no"}, "✗ wrong") : ""),
            h("span", {}, "reward ", h("b", {}, num(r.reward, 2))),
            Object.entries(r.rewards).map(([k, v]) => h("span", {}, k + " ", h("b", {}, num(v, 2)))),
            h("span", {}, "advantage ", h("b", {}, r.advantage == null ? "–" : signed(r.advantage))),
            h("span", {}, r.tokens == null ? "" : `${num(r.tokens)} tokens`),
            r.truncated && h("span", {class: "no"}, "cut by the length limit")),
          completion(r, state.by)))));
    }
    const select = (label, key, values) => h("label", {}, label, h("select", {"aria-label": label, onchange: (e) => { state[key] = e.target.value; filter(); }}, h("option", {value: ""}, "all"), values.map(([v, t]) => h("option", {value: v}, t))));
    const recorded = D.groups.some((g) => g.rows.some((r) => r.figures));
    section("samples", "Samples",
      h("p", {class: "sub"}, D.samplesNote),
      h("div", {class: "bar"},
        used.length > 1 && select("Run", "run", used.map((r) => [r, D.runs[r].name + (D.runs[r].label ? ` (${D.runs[r].label})` : "")])),
        select("Step", "step", [...new Set(D.groups.map((g) => g.step))].sort((a, b) => a - b).map((s) => [s, s])),
        kinds.map(([k, t]) => h("button", {type: "button", "data-kind": k, "aria-pressed": "false", onclick: (e) => { state.kind.has(k) ? state.kind.delete(k) : state.kind.add(k); e.currentTarget.setAttribute("aria-pressed", String(state.kind.has(k))); filter(); }}, t)),
        h("input", {type: "search", placeholder: "Find text", "aria-label": "Find text", oninput: (e) => { state.text = e.target.value.toLowerCase(); filter(); }}), count),
      h("div", {class: "bar"},
        h("span", {class: "key"}, h("span", {class: "think"}, "think"), h("span", {class: "semantic_elements"}, "semantic elements"), h("span", {class: "answer"}, "answer")),
        recorded && h("label", {}, "Colour tokens by", h("select", {"aria-label": "Colour tokens by", onchange: (e) => { state.by = e.target.value; draw(); }}, [["", "nothing"], ["ratio", "ratio π/π_old"], ["kl", "KL to the reference"], ["entropy", "entropy"], ["sampler", "π_old/π_sampler"]].map(([v, t]) => h("option", {value: v}, t))))),
      h("div", {class: "browser"}, list, detail));
    filter();
  }

  // ---------------------------------------------------------------- every run, and what is not here
  section("runs", "Runs",
    table([{name: "run", text: true}, {name: "state", text: true}, ...heads(D.columns), ...figureHeads],
      D.runs.map((r) => [{v: r.name, c: r.name}, {v: r.state, c: r.state}, ...texts(r.values), ...D.figures.map((m) => ({v: r.figures[m]}))])));
  if (D.leftOut.length) section("left-out", "Not on this page", D.leftOut.map((t) => h("p", {class: "sub"}, t)));
  document.documentElement.dataset.ready = "true";
})();
