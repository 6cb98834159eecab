"use strict";
(() => {
  const study = JSON.parse(document.getElementById("study").textContent);
  const part = (id) => document.getElementById(id);
  const below = (n) => { // an unbiased whole number below n
    const most = Math.floor(2 ** 32 / n) * n;
    for (;;) { const [drawn] = crypto.getRandomValues(new Uint32Array(1)); if (drawn < most) return drawn % n; }
  };
  const session = [...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16).padStart(2, "0")).join("");
  const trials = study.trials.map((trial) => ({ ...trial, swapped: below(2) }));
  for (let n = trials.length - 1; n > 0; n--) { const m = below(n + 1); [trials[n], trials[m]] = [trials[m], trials[n]]; }
  trials.length = Math.min(trials.length, study.session);
  const answers = [];
  let since = 0, saved = true;

  const picture = (place, number) => {
    const image = part(place);
    image.onload = () => { image.style.width = image.naturalWidth / devicePixelRatio + "px"; };
    image.src = study.pictures[number];
  };
  const show = (original) => {
    const trial = trials[answers.length], [first, second, reference] = trial.shown;
    const kept = original && reference !== undefined;
    picture("a", kept ? reference : trial.swapped ? second : first);
    picture("b", kept ? reference : trial.swapped ? first : second);
  };
  const ask = () => {
    if (answers.length === trials.length) return end();
    part("progress").textContent = `${answers.length + 1} of ${trials.length}`;
    part("original").hidden = trials[answers.length].shown.length < 3;
    part("back").disabled = !answers.length;
    show(false);
    since = performance.now();
    document.body.dataset.trial = answers.length;
  };
  const choose = (choice) => {
    const trial = trials[answers.length];
    const seconds = Math.round(performance.now() - since) / 1000;
    answers.push({ trial: trial.id, a: trial.swapped ? "second" : "first", choice, seconds });
    saved = false;
    ask();
  };
  const back = () => { if (answers.length) { answers.pop(); ask(); } };
  const end = () => {
    part("ask").hidden = true;
    part("end").hidden = false;
    part("count").textContent = `${answers.length} answers.`;
    const screen_ = { width: screen.width, height: screen.height, ratio: devicePixelRatio };
    const text = JSON.stringify({ study: study.study, session, who: part("who").value, screen: screen_, answers }, null, 1);
    part("save").download = `answers-${session}.json`;
    part("save").href = "data:application/json;charset=utf-8," + encodeURIComponent(text);
    document.body.dataset.ended = "1";
  };
  const asking = () => !part("ask").hidden;

  part("length").textContent = `${trials.length} pairs`;
  part("begin").onclick = () => { part("start").hidden = true; part("ask").hidden = false; ask(); };
  for (const button of document.querySelectorAll("[data-choice]")) button.onclick = () => choose(button.dataset.choice);
  part("back").onclick = back;
  part("stop").onclick = end;
  part("save").onclick = () => { saved = true; };
  part("original").onpointerdown = () => show(true);
  for (const event of ["pointerup", "pointerleave", "pointercancel"]) part("original").addEventListener(event, () => { if (asking()) show(false); });
  const keys = { ArrowLeft: () => choose("a"), ArrowRight: () => choose("b"), ArrowDown: () => choose("same"), Backspace: back };
  addEventListener("keydown", (event) => {
    if (!asking() || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = event.key === " " ? () => show(true) : keys[event.key];
    if (!act) return;
    event.preventDefault();
    if (!event.repeat) act();
  });
  addEventListener("keyup", (event) => { if (asking() && event.key === " ") { event.preventDefault(); show(false); } });
  addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
  document.body.dataset.ready = document.body.dataset.drawn = "1";
})();
