// The report's viewer, blind vote, price slider and table sorting. Without it the page still shows every picture and number.
"use strict";
(() => {
  const find = (id) => document.getElementById(id);

  // Sortable tables -------------------------------------------------------------------------------------------------
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (!head.textContent.trim()) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.setAttribute("aria-label", `Sort by ${head.textContent}`);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => {
          const cell = row.cells[column];
          return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
        };
        const missing = (row) => row.cells[column].classList.contains("void") || row.cells[column].textContent === "";
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          if (missing(a) || missing(b)) return missing(a) - missing(b);
          const [x, y] = [key(a), key(b)];
          const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
          return down ? -order : order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // The reader's own price: what the same rule keeps at it, as the report worked it out -------------------------------
  const price = find("price");
  if (price) {
    const { answers, places: chosen } = JSON.parse(price.dataset.choices);
    const range = find("price-range");
    const [area, line, label] = ["area", "line", "label"].map((part) => find(`front-price-${part}`));
    const { low, least, high } = line.closest("svg").dataset;
    const drawing = line.closest("[role=img]");
    const alt = drawing.getAttribute("aria-label");
    // The figure's line, area and label stay within its axis: a price below it makes all of it grey.
    const move = (percent) => {
      const kept = Math.max(100 - percent, Number(low));
      const { y: top, height } = area.getBBox(); // as drawn: from the axis's upper end down to the study's price
      const unit = height / (high - least);
      const down = (least - kept) * unit;
      line.setAttribute("transform", `translate(0 ${down})`);
      area.setAttribute("transform", `translate(0 ${top}) scale(1 ${(high - kept) / (high - least)}) translate(0 ${-top})`);
      // Where there is no room under the line, the label stands above it.
      label.setAttribute("transform", `translate(0 ${(kept - low) * unit < 12 ? down - 15 : down})`);
      label.querySelector("text").textContent = `price: at most ${percent} % lost`;
      drawing.setAttribute("aria-label", `${alt} The price line was moved to ${100 - percent} % kept.`);
    };
    range.addEventListener("input", () => {
      move(Number(range.value));
      const [headline, detail] = answers[chosen[Number(range.value)]];
      find("price-value").textContent = `${range.value} %`;
      range.setAttribute("aria-valuetext", `${range.value} %`);
      // Only a change is written, so that a screen reader says it once.
      if (find("price-answer").textContent !== headline) find("price-answer").textContent = headline;
      if (find("price-detail").textContent !== detail) find("price-detail").textContent = detail;
    });
    find("price-control").hidden = false;
  }

  // The pictures on the page: place ("normal-000-0") -> its prompt and, for each arm, the picture ----------------------
  const places = new Map();
  const arms = [];
  for (const row of document.querySelectorAll(".prompt[data-key]")) {
    const { key, prompt, category, seed } = row.dataset;
    if (!places.has(key)) places.set(key, { key, prompt, category, seed, pictures: new Map() });
    for (const image of row.querySelectorAll("img[data-arm]")) {
      const score = image.closest("figure").querySelector(".label span").textContent;
      places.get(key).pictures.set(image.dataset.arm, { source: image.src, path: image.dataset.path, score });
      if (!arms.includes(image.dataset.arm)) arms.push(image.dataset.arm);
    }
  }
  const shared = (a, b) => [...places.values()].filter((place) => place.pictures.has(a) && place.pictures.has(b));
  if (arms.length < 2) return;

  const fillSelect = (select, values, chosen) => {
    select.replaceChildren(...values.map((value) => new Option(value, value, value === chosen, value === chosen)));
    select.value = chosen;
  };
  const kept = document.querySelector("#verdict-title").dataset.keep;
  const second = arms.includes(kept) ? kept : arms[1];

  // Slider and flicker ----------------------------------------------------------------------------------------------
  const stage = document.querySelector("#viewer .stage");
  const [under, over] = stage.querySelectorAll("img");
  const [tagLeft, tagRight] = [stage.querySelector(".left"), stage.querySelector(".right")];
  const slider = document.querySelector("#viewer input[type=range]");
  const [selectA, selectB] = [find("viewer-a"), find("viewer-b")];
  let position = 0;
  let timer = null;

  const show = () => {
    const [a, b] = [selectA.value, selectB.value];
    const list = shared(a, b);
    if (!list.length) return;
    position = (position + list.length) % list.length;
    const place = list[position];
    under.src = place.pictures.get(a).source;
    over.src = place.pictures.get(b).source;
    under.alt = `${a}: ${place.prompt}`;
    over.alt = `${b}: ${place.prompt}`;
    tagLeft.textContent = a;
    tagRight.textContent = b;
    document.querySelector("#viewer .now").textContent = place.prompt;
    find("viewer-scores").textContent =
      `${position + 1} of ${list.length}, ${place.category}, seed ${place.seed}` +
      (place.pictures.get(a).score ? ` · CLIP score ${a} ${place.pictures.get(a).score}, ${b} ${place.pictures.get(b).score}` : "");
  };
  const cut = () => stage.style.setProperty("--cut", `${slider.value}%`);
  const toggle = () => {
    over.hidden = !over.hidden;
    tagLeft.hidden = stage.dataset.mode === "flicker" && !over.hidden;
    tagRight.hidden = stage.dataset.mode === "flicker" && over.hidden;
  };
  const flicker = (on) => {
    clearInterval(timer);
    timer = null;
    stage.dataset.mode = on ? "flicker" : "slide";
    find("viewer-flicker").setAttribute("aria-pressed", String(on));
    over.hidden = tagLeft.hidden = tagRight.hidden = false;
    slider.disabled = on;
    if (on) {
      toggle();
      // Never faster than 1.4 changes a second, and by the F key alone for readers who asked for reduced motion.
      if (!matchMedia("(prefers-reduced-motion: reduce)").matches) timer = setInterval(toggle, 700);
    }
  };
  const turn = (select, by) => {
    const next = (select.selectedIndex + by + select.options.length) % select.options.length;
    select.selectedIndex = next;
    show();
  };
  fillSelect(selectA, arms, arms[0]);
  fillSelect(selectB, arms, second === arms[0] ? arms[1] : second);
  selectA.addEventListener("change", show);
  selectB.addEventListener("change", show);
  slider.addEventListener("input", cut);
  stage.addEventListener("pointermove", (event) => {
    if (stage.dataset.mode !== "slide" || (event.pointerType !== "mouse" && !event.buttons)) return;
    const box = stage.getBoundingClientRect();
    slider.value = String(Math.round((100 * (event.clientX - box.left)) / box.width));
    cut();
  });
  find("viewer-previous").addEventListener("click", () => { position -= 1; show(); });
  find("viewer-next").addEventListener("click", () => { position += 1; show(); });
  find("viewer-flicker").addEventListener("click", () => flicker(stage.dataset.mode !== "flicker"));
  find("viewer-body").addEventListener("keydown", (event) => {
    if (event.target.matches("select, input") || event.altKey || event.ctrlKey || event.metaKey) return;
    const actions = {
      ArrowRight: () => { position += 1; show(); },
      ArrowLeft: () => { position -= 1; show(); },
      ArrowDown: () => turn(selectB, 1),
      ArrowUp: () => turn(selectB, -1),
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
  find("viewer").hidden = false;
  show();
  cut();

  // Blind vote ------------------------------------------------------------------------------------------------------
  const [voteA, voteB, voteCount] = [find("vote-a"), find("vote-b"), find("vote-count")];
  const vote = find("vote");
  let session = null;

  // A small seeded generator (mulberry32), so that the logged seed gives the same order again.
  const randomFrom = (seed) => {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  };
  const shuffle = (list, random) => {
    for (let i = list.length - 1; i > 0; i -= 1) {
      const j = Math.floor(random() * (i + 1));
      [list[i], list[j]] = [list[j], list[i]];
    }
    return list;
  };
  const offerCounts = () => {
    const all = shared(voteA.value, voteB.value).length;
    const counts = [...new Set([10, 25, 50, all].filter((count) => count <= all))].sort((a, b) => a - b);
    fillSelect(voteCount, counts.map(String), String(counts[0]));
  };
  const part = (id) => ["vote-start", "vote-run", "vote-end"].forEach((name) => { find(name).hidden = name !== id; });
  const ask = () => {
    const trial = session.trials[session.next];
    const place = places.get(trial.place);
    vote.querySelector(".now").textContent = place.prompt;
    find("vote-progress").textContent = `${session.next + 1} of ${session.trials.length}: which picture fits the prompt better?`;
    vote.querySelector(".l").src = place.pictures.get(trial.left).source;
    vote.querySelector(".r").src = place.pictures.get(trial.right).source;
  };
  const answer = (side) => {
    const trial = session.trials[session.next];
    trial.answer = side;
    trial.preferred = side === "tie" ? null : trial[side];
    session.next += 1;
    if (session.next < session.trials.length) ask();
    else reveal();
  };
  const reveal = () => {
    const done = session.trials.filter((trial) => trial.answer);
    const counts = { [session.a]: 0, [session.b]: 0, tie: 0 };
    done.forEach((trial) => { counts[trial.preferred ?? "tie"] += 1; });
    const result = {
      study: session.study, arms: [session.a, session.b], seed: session.seed, planned: session.trials.length, votes: done.length, counts,
      trials: done.map(({ place, prompt, left, right, answer: given, preferred }) => ({ place, prompt, left, right, answer: given, preferred })),
    };
    find("vote-json").textContent = JSON.stringify(result, null, 2);
    find("vote-result").textContent = done.length
      ? `${session.a} ${counts[session.a]}, ${session.b} ${counts[session.b]}, ties ${counts.tie}, of ${done.length} blind votes.`
      : "No vote was cast.";
    find("vote-note").textContent = "One person's votes on these prompts. Keep the JSON: it logs sides, order and answers.";
    part("vote-end");
    find("vote-end").focus();
  };
  fillSelect(voteA, arms, second);
  fillSelect(voteB, arms, arms.find((arm) => arm !== second));
  offerCounts();
  voteA.addEventListener("change", offerCounts);
  voteB.addEventListener("change", offerCounts);
  find("vote-go").addEventListener("click", () => {
    const [a, b] = [voteA.value, voteB.value];
    if (a === b) {
      voteB.selectedIndex = (voteB.selectedIndex + 1) % voteB.options.length;
      offerCounts();
      return;
    }
    const seed = crypto.getRandomValues(new Uint32Array(1))[0];
    const random = randomFrom(seed);
    const trials = shuffle(shared(a, b), random).slice(0, Number(voteCount.value)).map((place) => {
      const swap = random() < 0.5;
      return { place: place.key, prompt: place.prompt, left: swap ? b : a, right: swap ? a : b };
    });
    session = { study: document.title, a, b, seed, trials, next: 0 };
    part("vote-run");
    ask();
    find("vote-left").focus();
  });
  find("vote-left").addEventListener("click", () => answer("left"));
  find("vote-right").addEventListener("click", () => answer("right"));
  find("vote-tie").addEventListener("click", () => answer("tie"));
  find("vote-stop").addEventListener("click", reveal);
  find("vote-again").addEventListener("click", () => part("vote-start"));
  find("vote-run").addEventListener("keydown", (event) => {
    const side = { 1: "left", 2: "tie", 3: "right" }[event.key];
    if (side && !event.altKey && !event.ctrlKey && !event.metaKey) answer(side);
  });
  find("vote-save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([find("vote-json").textContent], { type: "application/json" }));
    link.download = `votes-${session.a}-${session.b}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  find("vote-copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(find("vote-json").textContent);
      find("vote-copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(find("vote-json"));
      find("vote-note").textContent = "The browser does not let a page copy here: the JSON is selected, press Ctrl+C.";
    }
  });
  vote.hidden = false;
})();
