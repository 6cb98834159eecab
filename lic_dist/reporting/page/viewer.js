"use strict";
// The charts and their legend, tables that sort, the picture viewer. The viewer's state lives in the address, so that a view can be sent.
(() => {
  const $ = (id) => document.getElementById(id);
  const MOST = 16; // CSS pixels a pixel of the picture

  const charts = JSON.parse($("charts").textContent), views = new Map();
  const pick = (view) => {
    const on = [...document.querySelectorAll('.legend button[aria-pressed="true"]')].map((one) => one.dataset.curve);
    return view.signal("picked", on).runAsync();
  };
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
      for (const view of views.values()) pick(view);
    });
  }
  const inOurColours = (spec) => { // the palette's for print becomes the page's, light or dark
    const style = getComputedStyle(document.documentElement);
    let text = JSON.stringify(spec);
    for (const [colour, name] of Object.entries(charts.palette)) {
      text = text.replaceAll(`"${colour}"`, `"${style.getPropertyValue(name).trim()}"`);
    }
    return JSON.parse(text);
  };
  const options = { mode: "vega-lite", ast: true, renderer: "svg", actions: { export: true, source: false, compiled: false, editor: false } };
  async function drawCharts() {
    for (const place of document.querySelectorAll("[data-chart]")) {
      views.get(place)?.finalize();
      const { view } = await vegaEmbed(place, inOurColours(charts.specs[place.dataset.chart]), options);
      views.set(place, view);
      await pick(view);
    }
    document.body.dataset.drawn = "1";
  }
  drawCharts();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);

  const figure = (cell) => Number.parseFloat(cell.textContent.replace("\u2212", "-"));
  for (const head of document.querySelectorAll("th[aria-sort]")) {
    head.firstElementChild.addEventListener("click", () => {
      const rows = [...head.closest("table").tBodies[0].rows], column = head.cellIndex;
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
      const compare = (a, b) => {
        const [x, y] = [figure(a.cells[column]), figure(b.cells[column])];
        if (Number.isNaN(x) && Number.isNaN(y)) return down * a.cells[column].textContent.localeCompare(b.cells[column].textContent, undefined, { numeric: true });
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1; // what has no figure stays last
        return down * (x - y);
      };
      rows[0].parentElement.append(...rows.sort(compare));
    });
  }
  const scrolls = () => {
    for (const one of document.querySelectorAll(".table")) {
      one.classList.toggle("scrolls", one.scrollWidth > one.clientWidth + 1);
    }
  };
  new ResizeObserver(scrolls).observe(document.body);
  scrolls();

  if (!$("pictures")) {
    document.body.dataset.ready = "1";
    return;
  }

  const data = JSON.parse($("pictures").textContent);
  const asked = new URLSearchParams(location.hash.slice(1)); // image=1&lambda=0&mode=split&arms=0-2&x=90&y=40&zoom=8&difference=4
  const probe = asked.has("probe"); // tells the colours that are drawn, for a test
  const canvas = $("view"), pen = canvas.getContext("2d", { willReadFrequently: probe });
  const state = { image: 0, set: 0, arms: data.start.slice(), mode: "side", shown: 0, split: 0.5, difference: false, gain: 8, x: 0, y: 0, scale: 1 };
  const loaded = new Map(), differences = new Map();
  let panes = [], timer = 0;

  if (state.arms.length > 2 && window.innerWidth < 600) state.arms.shift(); // two fit on a phone: without the original

  const image = () => data.images[state.image];
  const set = () => image().sets[state.set];
  const picture = (arm) => (arm === 0 ? image().original : set().pictures[arm]);
  const arms = () => state.arms.filter((arm) => picture(arm));
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  function bitmap(src) {
    if (!loaded.has(src)) {
      const one = new Image();
      one.onload = draw;
      one.src = src;
      loaded.set(src, one);
    }
    const one = loaded.get(src);
    return one.complete && one.naturalWidth ? one : null;
  }

  function pixels(one) {
    const sheet = document.createElement("canvas");
    sheet.width = one.width; sheet.height = one.height;
    const ink = sheet.getContext("2d", { willReadFrequently: true });
    ink.drawImage(one, 0, 0);
    return [sheet, ink, ink.getImageData(0, 0, one.width, one.height)];
  }

  // |x - x_hat| times the gain; null while a picture loads
  function difference(arm) {
    const key = [state.image, state.set, arm, state.gain].join();
    if (differences.has(key)) return differences.get(key);
    const a = bitmap(picture(0).src), b = bitmap(picture(arm).src);
    if (!a || !b) return null;
    const x = pixels(a)[2].data, [sheet, ink, out] = pixels(b);
    for (let i = 0; i < x.length; i++) if (i % 4 !== 3) out.data[i] = state.gain * Math.abs(x[i] - out.data[i]);
    ink.putImageData(out, 0, 0);
    if (differences.size > 11) differences.delete(differences.keys().next().value);
    differences.set(key, sheet);
    return sheet;
  }

  const source = (arm) => (state.difference && picture(0) ? difference(arm) : bitmap(picture(arm).src));

  // Panes as columns and rows that show the pictures largest
  function layout(count) {
    const wide = canvas.clientWidth, high = canvas.clientHeight, gap = 3;
    let best = null;
    for (let columns = 1; columns <= count; columns++) {
      const rows = Math.ceil(count / columns);
      const w = (wide - gap * (columns - 1)) / columns, h = (high - gap * (rows - 1)) / rows;
      const fit = Math.min(w / image().width, h / image().height) * (1 - 0.25 * (rows * columns - count));
      if (!best || fit > best.fit) best = { fit, columns, w, h };
    }
    return Array.from({ length: count }, (_, i) => ({
      x: (i % best.columns) * (best.w + gap), y: Math.floor(i / best.columns) * (best.h + gap), w: best.w, h: best.h,
    }));
  }

  const least = () => Math.min(panes[0].w / image().width, panes[0].h / image().height, 1);

  function settle() {
    state.scale = clamp(state.scale, least(), MOST);
    for (const [axis, size, room] of [["x", image().width, panes[0].w], ["y", image().height, panes[0].h]]) {
      const half = Math.min(room / state.scale / 2, size / 2);
      state[axis] = clamp(state[axis], half, size - half);
    }
  }

  function paint(pane, arm, from) {
    const drawn = source(arm);
    if (!drawn) return false;
    pen.save();
    pen.beginPath();
    pen.rect(pane.x + from, pane.y, pane.w - from, pane.h);
    pen.clip();
    pen.imageSmoothingEnabled = state.scale < 1.5;
    pen.imageSmoothingQuality = "high";
    const x = pane.x + pane.w / 2 - state.x * state.scale, y = pane.y + pane.h / 2 - state.y * state.scale;
    pen.drawImage(drawn, x, y, image().width * state.scale, image().height * state.scale);
    pen.restore();
    return true;
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1, chosen = arms();
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    panes = layout(state.mode === "side" ? chosen.length : 1);
    settle();
    state.shown %= chosen.length;
    let shown = state.mode === "side" ? chosen : [chosen[state.shown]], whole = true, captions = [];
    if (state.mode === "split" && chosen.length > 1) {
      shown = [chosen[0], chosen[chosen.length - 1]];
      const at = state.split * panes[0].w;
      whole = paint(panes[0], shown[0], 0);
      pen.fillStyle = getComputedStyle($("stage")).backgroundColor;
      pen.fillRect(at, 0, panes[0].w - at, panes[0].h);
      whole = paint(panes[0], shown[1], at) && whole;
      pen.fillStyle = "#fff";
      pen.fillRect(at - 1, 0, 2, panes[0].h);
      pen.beginPath();
      pen.arc(at, panes[0].h / 2, 9, 0, 7);
      pen.fill();
      captions = [{ x: 0, y: 0, w: panes[0].w / 2 }, { x: panes[0].w, y: 0, w: panes[0].w / 2, right: true }];
    } else {
      shown.forEach((arm, i) => { whole = paint(panes[i], arm, 0) && whole; });
      captions = panes;
    }
    $("captions").replaceChildren(...shown.map((arm, i) => caption(arm, captions[i])));
    map();
    if (whole) {
      if (probe) document.body.dataset.probe = JSON.stringify(shown.map((arm, i) => probed(arm, i, ratio)));
      document.body.dataset.ready = "1";
    }
  }

  function caption(arm, place) {
    const box = document.createElement("span"), name = document.createElement("strong");
    name.textContent = data.arms[arm].name;
    box.append(name, (state.difference && arm ? `|x - x̂| × ${state.gain}  ` : "") + (picture(arm).figures || ""));
    box.style.top = `${place.y + 7}px`;
    box.style.maxWidth = `${place.w - 14}px`;
    if (place.right) box.style.right = "7px";
    else box.style.left = `${place.x + 7}px`;
    return box;
  }

  // The colour that the canvas shows of an arm, in the middle of its pane or of its side of the split
  function probed(arm, number, ratio) {
    const pane = panes[Math.min(number, panes.length - 1)];
    const part = state.mode === "split" ? (number ? 1 + state.split : state.split) / 2 : 0.5;
    const [r, g, b] = pen.getImageData((pane.x + pane.w * part) * ratio, (pane.y + pane.h / 2) * ratio, 1, 1).data;
    return { arm: data.arms[arm].name, rgb: [r, g, b] };
  }

  function map() {
    const sheet = $("map"), first = arms().map((arm) => bitmap(picture(arm).src)).find((one) => one);
    sheet.hidden = !first || state.scale <= least() * 1.02;
    if (sheet.hidden) return;
    const { width, height } = image(), small = Math.min(110 / Math.max(width, height), 1), ink = sheet.getContext("2d");
    sheet.width = width * small; sheet.height = height * small;
    ink.globalAlpha = 0.85;
    ink.drawImage(first, 0, 0, sheet.width, sheet.height);
    ink.globalAlpha = 1;
    ink.strokeStyle = "#ffc400"; ink.lineWidth = 2;
    const w = Math.min(panes[0].w / state.scale, width), h = Math.min(panes[0].h / state.scale, height);
    ink.strokeRect((state.x - w / 2) * small, (state.y - h / 2) * small, w * small, h * small);
  }

  function update() {
    const press = (button, on) => button.setAttribute("aria-pressed", on);
    const side = state.mode === "side", count = arms().length;
    $("stage").classList.toggle("tall", side && count > 1);
    $("image").value = state.image;
    image().sets.forEach((_, i) => press($("lambdas").children[i + 1], i === state.set));
    for (const button of $("modes").children) press(button, button.dataset.mode === state.mode);
    data.arms.forEach((_, arm) => {
      $("arms").children[arm].disabled = !picture(arm);
      press($("arms").children[arm], arms().includes(arm));
    });
    $("difference").hidden = !image().original;
    press($("difference"), state.difference);
    press($("auto"), Boolean(timer));
    $("gain").hidden = !state.difference;
    $("flickering").hidden = state.mode !== "flicker" || count < 2;
    $("splitting").hidden = state.mode !== "split" || count < 2;
    draw();
    const { image: i, set: s, mode, x, y, scale } = state;
    const told = { image: i, lambda: s, mode, arms: state.arms.join("-"), x: x.toFixed(1), y: y.toFixed(1), zoom: scale.toFixed(2) };
    if (state.difference) told.difference = state.gain;
    if (!probe) history.replaceState(null, "", `#${new URLSearchParams(told)}`);
  }

  function zoom(factor, px = panes[0].x + panes[0].w / 2, py = panes[0].y + panes[0].h / 2) {
    const pane = panes.find((one) => px >= one.x && px <= one.x + one.w && py >= one.y && py <= one.y + one.h) || panes[0];
    const dx = px - pane.x - pane.w / 2, dy = py - pane.y - pane.h / 2, before = state.scale;
    state.scale = clamp(before * factor, least(), MOST);
    state.x += dx / before - dx / state.scale;
    state.y += dy / before - dy / state.scale;
    update();
    return state.scale !== before;
  }

  const pan = (dx, dy) => { state.x -= dx / state.scale; state.y -= dy / state.scale; update(); };
  const fit = () => { state.scale = 0; update(); };

  function busiest() {
    const [left, top, side] = set().window;
    panes = layout(state.mode === "side" ? arms().length : 1);
    state.x = left + side / 2; state.y = top + side / 2;
    state.scale = Math.min(panes[0].w, panes[0].h) / side;
    update();
  }

  function flip(step = 1) {
    if (state.mode !== "flicker") state.mode = "flicker";
    state.shown = (state.shown + step + arms().length) % arms().length;
    update();
  }

  function automatic(on) {
    clearInterval(timer);
    timer = on ? setInterval(flip, 700) : 0;
    $("captions").ariaLive = on ? "off" : "polite";
  }

  function choose(arm) {
    if (!data.arms[arm] || !picture(arm)) return;
    const held = state.arms.includes(arm);
    if (state.mode === "flicker") {
      if (!held) state.arms = [...state.arms, arm].sort((a, b) => a - b);
      state.shown = arms().indexOf(arm);
    } else if (!held) state.arms = [...state.arms, arm].sort((a, b) => a - b);
    else if (arms().length > 1) state.arms = state.arms.filter((one) => one !== arm);
    update();
  }

  function button(parent, text, key, act) {
    const one = document.createElement("button");
    one.type = "button";
    if (key) {
      const mark = document.createElement("span");
      mark.className = "key"; mark.textContent = key; mark.ariaHidden = "true";
      one.append(mark);
    }
    one.append(text);
    one.addEventListener("click", act);
    parent.append(one);
  }

  function lambdas() {
    const title = document.createElement("span");
    title.textContent = "lambda";
    $("lambdas").replaceChildren(title);
    image().sets.forEach((one, i) => button($("lambdas"), one.lambda, "", () => { state.set = i; start(); }));
  }

  // After another picture or lambda: what is chosen may not be there
  function start() {
    state.set = Math.min(state.set, image().sets.length - 1);
    if (!arms().length) state.arms = data.arms.map((_, arm) => arm).filter(picture).slice(0, 3);
    update();
  }

  data.images.forEach((one, i) => $("image").append(new Option(one.name, i)));
  data.arms.forEach((one, arm) => button($("arms"), one.name, arm < 9 ? arm + 1 : "", () => choose(arm)));
  $("image").addEventListener("change", () => { state.image = Number($("image").value); lambdas(); start(); busiest(); });
  for (const one of $("modes").children) {
    one.addEventListener("click", () => { automatic(false); state.mode = one.dataset.mode; update(); });
  }
  $("in").addEventListener("click", () => zoom(1.6));
  $("out").addEventListener("click", () => zoom(1 / 1.6));
  $("fit").addEventListener("click", fit);
  $("busy").addEventListener("click", busiest);
  $("difference").addEventListener("click", () => { state.difference = !state.difference; update(); });
  $("gain").addEventListener("input", () => { state.gain = Number($("gain").value); update(); });
  $("split").addEventListener("input", () => { state.split = $("split").value / 100; update(); });
  $("auto").addEventListener("click", () => { automatic(!timer); update(); });
  $("hold").addEventListener("pointerdown", (event) => { $("hold").setPointerCapture(event.pointerId); flip(1); });
  for (const end of ["pointerup", "pointercancel"]) $("hold").addEventListener(end, () => flip(-1));
  $("hold").addEventListener("click", (event) => { if (event.detail === 0) flip(1); }); // by keyboard

  const fingers = new Map();
  let dragsSplit = false;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, event);
    dragsSplit = state.mode === "split" && arms().length > 1 && Math.abs(event.offsetX - state.split * panes[0].w) < 22;
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    fingers.set(event.pointerId, event);
    const dx = event.offsetX - before.offsetX, dy = event.offsetY - before.offsetY;
    if (fingers.size === 2) {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const reach = (one) => Math.max(Math.hypot(one.offsetX - other.offsetX, one.offsetY - other.offsetY), 1);
      pan(dx / 2, dy / 2);
      zoom(reach(event) / reach(before), (event.offsetX + other.offsetX) / 2, (event.offsetY + other.offsetY) / 2);
    } else if (dragsSplit) {
      state.split = clamp(event.offsetX / panes[0].w, 0, 1);
      $("split").value = 100 * state.split;
      update();
    } else pan(dx, dy);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("dblclick", (event) => zoom(2, event.offsetX, event.offsetY));
  let taken = false; // the wheel is the page's until the viewer is clicked, and again after a click elsewhere
  document.addEventListener("pointerdown", (event) => { taken = $("viewer").contains(event.target); }, true);
  canvas.addEventListener("wheel", (event) => { // where it zooms no further the page scrolls
    if (taken && zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), event.offsetX, event.offsetY)) event.preventDefault();
  }, { passive: false });

  const MOVES = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
  let pressed = 0;
  document.addEventListener("keydown", (event) => {
    const here = event.target === document.body || event.target === canvas;
    if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key;
    if (MOVES[key] && (event.target === canvas || taken)) pan(...MOVES[key]);
    else if (key === " ") { if (!event.repeat) { pressed = event.timeStamp; flip(1); } }
    else if (/^[1-9]$/.test(key)) choose(Number(key) - 1);
    else if (key === "+" || key === "=") zoom(1.6);
    else if (key === "-") zoom(1 / 1.6);
    else if (key === "0") fit();
    else if (key === "d") $("difference").click();
    else return;
    event.preventDefault();
  });
  document.addEventListener("keyup", (event) => { // held: only a look at the next
    if (event.key === " " && pressed && event.timeStamp - pressed > 350) flip(-1);
    pressed = 0;
  });
  new ResizeObserver(draw).observe(canvas);

  const number = (key, most) => clamp(Number(asked.get(key)) || 0, 0, most);
  const index = (key, count) => Math.trunc(number(key, count - 1));
  state.image = index("image", data.images.length);
  state.set = asked.has("lambda") ? index("lambda", image().sets.length) : image().first;
  if (["side", "flicker", "split"].includes(asked.get("mode"))) state.mode = asked.get("mode");
  if (asked.has("arms")) state.arms = data.arms.map((_, arm) => arm).filter((arm) => asked.get("arms").split("-").includes(String(arm)));
  if (asked.has("difference")) { state.difference = true; state.gain = clamp(number("difference", 32), 1, 32); $("gain").value = state.gain; }
  lambdas();
  if (asked.get("zoom") > 0) {
    Object.assign(state, { x: number("x", image().width), y: number("y", image().height), scale: Number(asked.get("zoom")) });
    start();
  } else {
    start();
    busiest();
  }
})();
