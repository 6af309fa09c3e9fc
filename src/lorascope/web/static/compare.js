// The compare page: arrows between pictures, the large view of two of them, one step for all arms; keys of the blind vote.
"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const turned = (index, by, count) => (index + by + count) % count;
  const isPlain = (event) => !event.altKey && !event.ctrlKey && !event.metaKey;

  // Blind vote: 1, 2 and 3 while the vote has the focus ---------------------------------------------------------------
  const vote = document.querySelector("form[data-vote]");
  if (vote) {
    vote.focus({ preventScroll: true });
    vote.addEventListener("keydown", (event) => {
      const button = isPlain(event) && !event.repeat && vote.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
      if (button) button.click();
    });
    // A second click while the answer is sent would be one on the next pair.
    vote.addEventListener("submit", (event) => {
      if (vote.dataset.sent) event.preventDefault();
      vote.dataset.sent = "1";
    });
    window.addEventListener("pageshow", () => { delete vote.dataset.sent; });
  }

  const dialog = find("large");
  if (!dialog) return;

  // The grid: a table of prompts by columns, or the list of tries -----------------------------------------------------
  const looks = (row) => [...row.querySelectorAll("a.look")];
  const rowsOf = (container) => [...container.querySelectorAll("[data-row]")].filter((row) => looks(row).length);
  const lookAt = (row, column) => looks(row).find((look) => look.dataset.column === column);
  const columnsOf = (container) => [...new Set(rowsOf(container).flatMap((row) => looks(row).map((look) => look.dataset.column)))];

  // One picture of each grid can be reached by Tab, the others by arrows.
  const rove = (look) => {
    for (const other of look.closest("[data-compare]").querySelectorAll("a.look")) other.tabIndex = other === look ? 0 : -1;
  };
  // Small pictures show their pixels, large ones are smoothed where they are made smaller.
  const markLarge = (image) => image.toggleAttribute("data-large", image.naturalWidth > 128);
  const prepare = () => {
    for (const container of document.querySelectorAll("[data-compare]")) {
      const all = [...container.querySelectorAll("a.look")];
      if (all.length && !all.some((look) => look.tabIndex === -1)) rove(all[0]);
      for (const image of container.querySelectorAll("img")) {
        if (image.complete) markLarge(image);
        image.addEventListener("load", () => markLarge(image));
      }
    }
  };
  document.addEventListener("focusin", (event) => {
    const look = event.target.closest("a.look");
    if (look) rove(look);
  });
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  document.addEventListener("keydown", (event) => {
    const look = event.target.closest && event.target.closest("a.look");
    const move = moves[event.key];
    if (!look || !move || !isPlain(event)) return;
    event.preventDefault();
    const container = look.closest("[data-compare]");
    const rows = rowsOf(container);
    const row = look.closest("[data-row]");
    const own = looks(row);
    const next = move[0]
      ? rows[rows.indexOf(row) + move[0]]
      : own[own.indexOf(look) + move[1]];
    if (!next) return;
    const target = move[0] ? lookAt(next, look.dataset.column) || looks(next)[0] : next;
    target.focus({ preventScroll: true });
    target.scrollIntoView({ block: "nearest", inline: "nearest" });
  });

  // One step for all arms: every picture of the grid changes to that epoch's ---------------------------------------------
  const stepsOf = (look) => JSON.parse(look.dataset.steps || "{}");
  const setStep = (container, epoch) => {
    for (const look of container.querySelectorAll("a.look[data-steps]")) {
      const steps = stepsOf(look);
      const known = Object.keys(steps).map(Number).sort((a, b) => a - b);
      const at = known.filter((one) => one <= epoch).pop() ?? known[0];
      for (const [element, key] of [[look, "href"], [look.querySelector("img"), "src"]]) {
        const address = new URL(element[key]);
        address.searchParams.set("path", steps[at]);
        if (element[key] !== address.href) element[key] = address.href;
      }
    }
    const chooser = find("choose-epoch");
    if (chooser) chooser.value = epoch;
    if (find("step-value")) find("step-value").textContent = epoch;
  };
  document.addEventListener("input", (event) => {
    if (event.target.id === "choose-epoch") setStep(document.querySelector("[data-compare]"), Number(event.target.value));
  });

  // The large view ----------------------------------------------------------------------------------------------------
  const pan = dialog.querySelector(".pan");
  const stage = dialog.querySelector(".stage");
  const [under, over] = stage.querySelectorAll("img");
  const [tagLeft, tagRight] = [stage.querySelector(".left"), stage.querySelector(".right")];
  const [slider, selectA, selectB, range] = ["large-cut", "large-a", "large-b", "large-range"].map(find);
  let container = null;
  let row = null;
  let timer = null;

  const epochs = () => {
    if (container.dataset.by === "epochs") return columnsOf(container).slice(1);
    const known = [...container.querySelectorAll("a.look[data-steps]")].flatMap((look) => Object.keys(stepsOf(look)).map(Number));
    return [...new Set(known)].sort((a, b) => a - b);
  };
  const fill = (select, names, chosen) => {
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.value = names.includes(chosen) ? chosen : names[0];
  };
  const score = (look) => (look.dataset.score ? `, CLIP score ${look.dataset.score}` : "");
  const show = () => {
    const names = looks(row).map((look) => look.dataset.column);
    fill(selectA, names, selectA.value);
    fill(selectB, names, selectB.value);
    const [a, b] = [lookAt(row, selectA.value), lookAt(row, selectB.value)];
    const rows = rowsOf(container);
    for (const [image, look, tag] of [[under, a, tagLeft], [over, b, tagRight]]) {
      if (image.src !== look.href) image.src = look.href;
      image.alt = `${look.dataset.column}: ${row.dataset.prompt}`;
      tag.textContent = look.dataset.column;
    }
    find("large-title").textContent = row.dataset.prompt;
    find("large-scores").textContent = `${rows.indexOf(row) + 1} of ${rows.length}, ${row.dataset.note}. `
      + `Left: ${a.dataset.column}${score(a)}. Right: ${b.dataset.column}${score(b)}.`;
    const steps = epochs();
    find("large-step").hidden = steps.length < 2;
    if (container.dataset.by === "epochs") range.value = String(Math.max(0, steps.indexOf(selectB.value)));
    find("large-epoch").textContent = steps[Number(range.value)] ?? "";
    range.setAttribute("aria-valuetext", String(steps[Number(range.value)] ?? ""));
  };
  const cut = () => stage.style.setProperty("--cut", `${slider.value}%`);
  const toggle = () => {
    over.hidden = !over.hidden;
    tagLeft.hidden = !over.hidden;
    tagRight.hidden = over.hidden;
  };
  const flicker = (on) => {
    clearInterval(timer);
    stage.dataset.mode = on ? "flicker" : "slide";
    find("large-flicker").setAttribute("aria-pressed", String(on));
    over.hidden = tagLeft.hidden = tagRight.hidden = false;
    slider.disabled = on;
    if (!on) return;
    toggle();
    // Never faster than 1.4 changes a second, and by the F key alone for readers who asked for reduced motion.
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) timer = setInterval(toggle, 700);
  };
  const zoom = () => {
    const times = Number(find("large-zoom").value);
    pan.toggleAttribute("data-zoom", times > 1);
    stage.style.width = "";
    const fitting = stage.clientWidth;
    if (times > 1) stage.style.width = `${times * fitting}px`;
    for (const image of [under, over]) image.toggleAttribute("data-large", image.naturalWidth > times * fitting);
  };
  const open = (look) => {
    container = look.closest("[data-compare]");
    row = look.closest("[data-row]");
    const names = looks(row).map((one) => one.dataset.column);
    fill(selectA, names, names[0]);
    fill(selectB, names, look.dataset.column === names[0] ? names[1] : look.dataset.column);
    const steps = epochs();
    range.max = String(Math.max(0, steps.length - 1));
    const now = find("choose-epoch");
    range.value = String(Math.max(0, now ? steps.indexOf(Number(now.value)) : steps.length - 1));
    flicker(false);
    show();
    cut();
    dialog.showModal();
    zoom();
    pan.focus();
  };
  const turnPrompt = (by) => {
    const rows = rowsOf(container);
    row = rows[turned(rows.indexOf(row), by, rows.length)];
    show();
  };
  const turnColumn = (by) => {
    selectB.selectedIndex = turned(selectB.selectedIndex, by, selectB.options.length);
    show();
  };
  document.addEventListener("click", (event) => {
    const look = event.target.closest("a.look");
    if (!look || event.button || event.shiftKey || !isPlain(event)) return;
    event.preventDefault();
    open(look);
  });
  dialog.addEventListener("close", () => {
    flicker(false);
    // What was looked at last has the focus.
    const look = row && row.isConnected && lookAt(row, selectB.value);
    if (look) look.focus();
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  selectA.addEventListener("change", show);
  selectB.addEventListener("change", show);
  slider.addEventListener("input", cut);
  under.addEventListener("load", zoom);
  over.addEventListener("load", zoom);
  find("large-zoom").addEventListener("change", zoom);
  find("large-previous").addEventListener("click", () => turnPrompt(-1));
  find("large-next").addEventListener("click", () => turnPrompt(1));
  find("large-flicker").addEventListener("click", () => flicker(stage.dataset.mode !== "flicker"));
  range.addEventListener("input", () => {
    const step = epochs()[Number(range.value)];
    if (container.dataset.by === "epochs") selectB.value = step;
    else setStep(container, step);
    show();
  });
  stage.addEventListener("pointermove", (event) => {
    if (stage.dataset.mode !== "slide" || (event.pointerType !== "mouse" && !event.buttons)) return;
    const box = stage.getBoundingClientRect();
    slider.value = String(Math.round((100 * (event.clientX - box.left)) / box.width));
    cut();
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("select, input") || !isPlain(event)) return;
    const actions = {
      ArrowRight: () => turnPrompt(1),
      ArrowLeft: () => turnPrompt(-1),
      ArrowDown: () => turnColumn(1),
      ArrowUp: () => turnColumn(-1),
      f: () => {
        if (stage.dataset.mode !== "flicker") flicker(true);
        else toggle();
        clearInterval(timer);
      },
    };
    const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  prepare();
  document.addEventListener("htmx:afterSwap", prepare);
})();
