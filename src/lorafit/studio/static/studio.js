"use strict";
// The one script of the studio. Pages work without it, but for live changes, talk and drop.
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const say = (text) => { one("#said").textContent = text; };
  const piece = async (address, options) => {
    const reply = await fetch(address, { credentials: "same-origin", ...options });
    const found = new DOMParser().parseFromString(await reply.text(), "text/html");
    return { isGood: reply.ok, body: found.body };
  };
  const said = async (reply) => {  // why it was refused
    const { body } = new DOMParser().parseFromString(await reply.text(), "text/html");
    return all(".problem p", body).map((part) => part.textContent).join(". ") || lost.dataset.refused;
  };
  const lost = one("#lost");
  const tell = (what = "") => {  // "gone": the studio does not answer; "refused": it has another token now; "": all is well
    const text = lost.dataset[what] ?? "";
    if (lost.textContent !== text) lost.textContent = text;
    one("#live")?.classList.toggle("stale", text !== "");
  };

  // Live pieces: sections that have changed take the place of the old ones, and keep what the reader has done to them.
  const live = one("#live");
  const shown = new Map();
  for (const section of live ? all("section[id]", live) : []) shown.set(section.id, section.outerHTML);
  const FOCUSABLE = "a[href], button, input, select, textarea, summary, [tabindex]";
  const isTyped = (element) => element?.matches("textarea, select, input:not([type=checkbox])");
  const replace = (old, section) => {
    const focused = old.contains(document.activeElement) ? all(FOCUSABLE, old).indexOf(document.activeElement) : -1;
    const open = all("details", old).map((part) => part.open);
    const chosen = new Set(all("input:checked", old).map((box) => box.value));
    const texts = all("input[type=search]", old).map((input) => input.value);
    const sorted = all("th[aria-sort]", old).map((head) => head.getAttribute("aria-sort"));
    const scrolled = all(".scroll, .log", old).map((box) => [box.scrollLeft, box.scrollTop, box.scrollTop + box.clientHeight > box.scrollHeight - 4]);
    old.replaceWith(section);
    all("details", section).forEach((part, index) => { if (open[index]) part.open = true; });
    for (const box of all("input[type=checkbox]", section)) box.checked = chosen.has(box.value);
    all("input[type=search]", section).forEach((input, index) => { input.value = texts[index] ?? ""; });
    all("th[aria-sort]", section).forEach((head, index) => { if ((sorted[index] ?? "none") !== "none") order(head, sorted[index]); });
    all(".scroll, .log", section).forEach((box, index) => {
      const [left, top, isAtEnd] = scrolled[index] ?? [0, 0, true];
      box.scrollLeft = left;
      box.scrollTop = isAtEnd && box.matches(".log") ? box.scrollHeight : top;
    });
    if (focused >= 0) all(FOCUSABLE, section)[focused]?.focus({ preventScroll: true });
  };
  let loading = false, again = false, waits = false;
  const refresh = async () => {
    if (!live || loading) { again = true; return; }
    loading = true;
    try {
      const form = live.dataset.view && one(live.dataset.view);
      const view = form ? "?" + new URLSearchParams(new FormData(form)) : "";
      const { isGood, body } = await piece(live.dataset.live + (view || location.search));
      const problems = all(".problem", body);
      if (isGood) {
        const sections = all("section[id]", live.dataset.pick ? one(live.dataset.pick, body).parentElement : body);
        const ids = new Set(sections.map((section) => section.id));
        for (const old of all(":scope > section[id], :scope > .problem", live)) if (!ids.has(old.id)) { old.remove(); shown.delete(old.id); }
        let last = null;
        for (const section of sections) {
          const old = one("#" + CSS.escape(section.id), live), text = section.outerHTML;
          const isSame = shown.get(section.id) === text, isBusy = isTyped(document.activeElement) && old?.contains(document.activeElement);
          waits ||= isBusy && !isSame;
          if (old && (isSame || isBusy)) { last = old; continue; }
          if (old) replace(old, section); else if (last) (last.nextElementSibling?.matches("form") ? last.nextElementSibling : last).after(section); else live.prepend(section);
          shown.set(section.id, text);
          last = section;
        }
        tell();
      } else if (problems.length) {  // such as a run that is not there any more
        live.replaceChildren(...problems);
        shown.clear();
        tell();
      } else tell("refused");
      for (const input of all("[data-filter]")) filter(input);
    } catch { tell("gone"); }
    loading = false;
    if (again) { again = false; setTimeout(refresh, 200); }
    more();
  };
  const more = () => { if (live && one("[data-more]", live)) setTimeout(refresh, 100); };  // steps are still being read
  more();
  live?.addEventListener("focusout", () => { if (waits) { waits = false; refresh(); } });  // what somebody typed into
  // One stream for all pages of a browser: the page that holds the lock listens and tells the others. A browser opens
  // few connections to one server, and ten streams would leave none for anything else.
  if (live?.dataset.watch && "locks" in navigator) {
    const channel = new BroadcastChannel("lorafit-studio");
    // What is no list is why there is no stream. A new stream begins with all runs.
    const take = (changed) => {
      if (!Array.isArray(changed)) tell(changed);
      else if (lost.textContent || changed.includes(live.dataset.watch)) refresh();
    };
    channel.onmessage = (event) => take(event.data);
    const pass = (changed) => { channel.postMessage(changed); take(changed); };
    const listen = () => {
      const source = new EventSource("/events");
      source.onmessage = (event) => pass(JSON.parse(event.data));
      source.onerror = () => {
        const isRefused = source.readyState === EventSource.CLOSED;  // else the browser tries again
        pass(isRefused ? "refused" : "gone");
        if (isRefused) setTimeout(listen, 5000);
      };
    };
    navigator.locks.request("lorafit-studio-events", () => new Promise(listen));
    document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
  }
  if (live?.dataset.every) {
    const timer = setInterval(() => { if (one("[data-over]", live)) clearInterval(timer); else refresh(); }, +live.dataset.every);
  }

  // The view of the charts: smoothing, and the steps that were dragged over.
  const view = one("#view");
  if (view) {
    const apply = () => {
      history.replaceState(null, "", "?" + new URLSearchParams(new FormData(view)));
      refresh();
    };
    view.addEventListener("submit", (event) => { event.preventDefault(); apply(); });
    view.addEventListener("change", apply);
    const whole = () => { view.from.value = view.to.value = ""; apply(); };
    one("[data-whole]", view)?.addEventListener("click", whole);
    let start = null, mark = null, plot = null;
    const share = (event) => {
      const box = plot.getBoundingClientRect();
      return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    };
    document.addEventListener("pointerdown", (event) => {
      plot = event.target.closest?.(".plot[data-lines]") ?? null;
      if (!plot || event.pointerType === "touch" || event.button !== 0) { plot = null; return; }
      start = share(event);
      mark = plot.appendChild(document.createElement("i"));
      mark.className = "range";
    });
    document.addEventListener("pointermove", (event) => {
      if (!plot) return;
      const now = share(event);
      mark.style.left = 100 * Math.min(start, now) + "%";
      mark.style.width = 100 * Math.abs(now - start) + "%";
    });
    document.addEventListener("pointerup", (event) => {
      if (!plot) return;
      const ends = [start, share(event)].sort((a, b) => a - b);
      mark.remove();
      const points = JSON.parse(plot.dataset.lines)[0].points;
      plot = null;
      if (ends[1] - ends[0] < 0.02) return;
      const step = (place) => points.reduce((best, point) => Math.abs(point[0] - place) < Math.abs(best[0] - place) ? point : best)[1].replaceAll(",", "");
      [view.from.value, view.to.value] = ends.map(step);
      apply();
    });
    document.addEventListener("dblclick", (event) => { if (event.target.closest?.(".plot")) whole(); });
  }

  // Tables: sort and filter; lists of choices: filter.
  const order = (head, direction) => {
    const table = head.closest("table"), column = head.cellIndex, isDown = direction === "descending";
    for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", other === head ? direction : "none");
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const rows = all("tbody tr", table).sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const sign = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return isDown ? -sign : sign;
    });
    table.tBodies[0].append(...rows);
  };
  const filter = (input) => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of all("tbody tr, label", one(input.dataset.filter) ?? document.createElement("table"))) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  };
  document.addEventListener("input", (event) => { if (event.target.matches?.("[data-filter]")) filter(event.target); });
  document.addEventListener("click", async (event) => {
    const head = event.target.closest?.("[data-sort]")?.closest("th");
    if (head) order(head, head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
    const copy = event.target.closest?.("[data-copy]");
    if (copy) {
      const text = one("pre", copy.parentElement).textContent;
      try { await navigator.clipboard.writeText(text); say(text); }
      catch { getSelection().selectAllChildren(one("pre", copy.parentElement)); }
    }
    const model = event.target.closest?.("[data-model]");
    if (model) {
      const input = document.getElementsByName("model.name")[0];
      input.value = model.dataset.model;
      input.dispatchEvent(new Event("input", { bubbles: true }));
      input.focus();
    }
  });
  for (const details of all("details[data-load]")) {
    details.addEventListener("toggle", async () => {
      const place = one("div", details);
      if (!details.open || place.childNodes.length) return;
      place.textContent = details.dataset.busy;
      place.className = "busy";
      try {
        const { isGood, body } = await piece(details.dataset.load);
        place.replaceChildren(...(isGood ? body.childNodes : all(".problem", body)));
      } catch { place.replaceChildren(); details.open = false; tell("gone"); }
      place.className = "";
    });
  }

  // A new run: problems at their fields and the plan, while one types.
  const fresh = one("#new-form");
  if (fresh) {
    let timer = null, planned = "", wrong = null, number = 0, checks = 0;
    const plan = async (recipe) => {
      if (recipe === planned) { if (wrong) mark(...wrong); return; }
      planned = recipe;
      wrong = null;
      const mine = ++number, place = one("#plan");
      place.innerHTML = "";
      const busy = place.appendChild(document.createElement("p"));
      busy.className = "busy";
      busy.textContent = place.dataset.busy;
      const { body } = await piece("/new/plan", { method: "POST", body: new URLSearchParams(new FormData(fresh)) });
      if (mine !== number) return;
      const text = one("[data-key]", body);
      if (text) mark(...(wrong = [text.dataset.key, text.textContent.split("\n")[0]]));
      place.replaceChildren(...body.childNodes);
    };
    const mark = (key, text) => {
      const input = key && document.getElementsByName(key)[0];
      const place = input ? one("#e-" + CSS.escape(key.replace(".", "-"))) : one("#errors");
      place.textContent += text + "\n";
      input?.setAttribute("aria-invalid", "true");
      const group = input?.closest("details");
      if (group) group.open = true;
    };
    const check = async () => {
      const mine = ++checks;
      const reply = await fetch("/new/check", { method: "POST", body: new URLSearchParams(new FormData(fresh)) });
      if (!reply.ok) { tell("refused"); return; }
      const told = await reply.json();
      if (mine !== checks) return;
      tell();
      for (const place of all(".field .wrong", fresh)) place.textContent = "";
      for (const input of all("[aria-invalid]", fresh)) input.removeAttribute("aria-invalid");
      one("#errors").textContent = "";
      for (const [key, message, hint] of told.errors) mark(key, message + (hint ? ": " + hint : ""));
      one("aside .command pre", fresh).textContent = told.command;
      one("#recipe").textContent = told.recipe;
      if (told.recipe) await plan(told.recipe);
    };
    fresh.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => check().catch(() => tell("gone")), 500); });
    // Also when one comes back to it: the browser has put in again what was typed.
    addEventListener("pageshow", () => {
      if (document.getElementsByName("model.name")[0].value) check().catch(() => tell("gone"));
    });
  }

  // A form whose answer may take long says so. Columns that are chosen become the text that the form sends.
  document.addEventListener("submit", (event) => {
    const place = event.target.dataset.busy && one("[role=status]", event.target);
    if (place) { place.textContent = event.target.dataset.busy; place.hidden = false; }
  });
  document.addEventListener("change", (event) => {
    const columns = event.target.closest?.("[data-columns]");
    if (!columns) return;
    const chosen = all("select", columns).filter((select) => select.value);
    const pairs = chosen.map((select) => select.dataset.column + ": " + JSON.stringify(select.value));
    document.getElementsByName("data.columns")[0].value = pairs.length ? "{" + pairs.join(", ") + "}" : "";
  });

  // Data: a dropped file goes in parts that the studio accepts.
  const drop = one("[data-drop]");
  if (drop) {
    const PART = 2 ** 21, place = one("[role=alert]", drop);
    const failed = (text) => { place.textContent = drop.dataset.error + ": " + text; };
    const take = async (file) => {
      place.textContent = "";
      const id = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      let path = "";
      for (let offset = 0; offset === 0 || offset < file.size; offset += PART) {
        const last = offset + PART >= file.size ? 1 : 0;
        const query = new URLSearchParams({ name: file.name, id, offset, last });
        const reply = await fetch("/data/upload?" + query, { method: "POST", body: file.slice(offset, offset + PART) });
        if (!reply.ok) { failed(await said(reply)); return; }
        path = (await reply.json()).path;
      }
      one("#d-path").value = path;
      say(drop.dataset.done);
      drop.closest("form").requestSubmit();
    };
    drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      const file = event.dataTransfer.files[0];
      if (file) take(file).catch(() => failed(lost.dataset.gone));
    });
    one("[data-pick-file]", drop).addEventListener("change", (event) => {
      const file = event.target.files[0];
      if (file) take(file).catch(() => failed(lost.dataset.gone));
    });
  }

  // Talk: one column per model, each with its own conversation. The tab keeps the turns: a reload does not lose them.
  const TALK = "lorafit talk";
  let turns = []; // of each: `asked`, and `said` by model: its answer or null, which the next question leaves out
  const talkModels = (form) =>
    JSON.parse(form.dataset.models).sort((a, b) => (b === form.dataset.base) - (a === form.dataset.base)); // the base first
  const keepTurns = (form) => {
    try { sessionStorage.setItem(TALK, JSON.stringify({ models: talkModels(form), turns })); } catch { /* full or off */ }
  };
  const MARKED = /<think>([^]*?)(?:<\/think>|$)|<tool_call>([^]*?)(?:<\/tool_call>|$)/g; // as in row_turns.py
  const show = (place, whole, names) => {
    const text = whole.includes("</think>") && !whole.split("</think>")[0].includes("<think>") ? "<think>" + whole : whole;
    const put = (kind, said) => {
      if (!said.trim()) return;
      const part = document.createElement("div");
      part.className = "part " + kind;
      if (kind !== "text") {
        const badge = part.appendChild(document.createElement("span"));
        badge.className = "badge small";
        badge.textContent = names[kind];
        part.append(" ");
      }
      part.append(said.trim());
      place.append(part);
    };
    place.replaceChildren();
    let start = 0;
    for (const match of text.matchAll(MARKED)) {
      put("text", text.slice(start, match.index));
      if (match[1] === undefined) put("call", match[2]); else put("thought", match[1]);
      start = match.index + match[0].length;
    }
    put("text", text.slice(start));
  };
  const answer = async (model, form, place) => {
    const system = form.system.value.trim();
    const earlier = turns.filter((turn) => turn.said[model] != null).flatMap((turn) => [
      { role: "user", content: turn.asked }, { role: "assistant", content: turn.said[model] }]);
    const question = { role: "user", content: form.prompt.value };
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...earlier, question];
    const asked = { model, messages, temperature: +form.temperature.value, top_p: +form.top_p.value, max_tokens: +form.max_tokens.value };
    const failed = (text) => { place.className = "wrong"; place.textContent = form.dataset.error + ": " + text; return null; };
    let text = "", rest = "";
    const reply = await fetch("/talk/answer", { method: "POST", body: JSON.stringify(asked) });
    if (!reply.ok) return failed((await reply.json()).error.message);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      rest += value;
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) return failed(event.error.message);
        text += event.choices?.[0]?.delta?.content ?? "";
        show(place, text, form.dataset);
      }
    }
    ended(place, text, form);
    return text;
  };
  const ended = (place, text, form) => {
    place.className = text.trim() ? "say" : "empty";
    if (text.trim()) show(place, text, form.dataset); else place.textContent = form.dataset.nothing;
  };
  const drawTurn = (form, asked) => {
    const turn = document.createElement("section");
    turn.className = "card turn";
    const question = turn.appendChild(document.createElement("div"));
    question.className = "asked";
    question.textContent = asked;
    const row = turn.appendChild(document.createElement("div"));
    row.className = "chat";
    one("#turns").prepend(turn);
    return talkModels(form).map((model) => {
      const column = row.appendChild(document.createElement("div"));
      const { base, baseIs } = form.dataset;
      column.appendChild(document.createElement("h3")).textContent = model === base ? `${model} (${baseIs})` : model;
      return [model, column.appendChild(document.createElement("div"))];
    });
  };
  const keptForm = one("#talk-form");
  if (keptForm) {
    let kept = null;
    try { kept = JSON.parse(sessionStorage.getItem(TALK)); } catch { /* not ours */ }
    if (JSON.stringify(kept?.models) === JSON.stringify(talkModels(keptForm))) turns = kept.turns;
    for (const { asked, said } of turns) {
      for (const [model, place] of drawTurn(keptForm, asked)) {
        if (said[model] == null) { place.className = "empty"; place.textContent = keptForm.dataset.nothing; }
        else ended(place, said[model], keptForm);
      }
    }
  }
  document.addEventListener("submit", async (event) => {
    const form = event.target;
    if (form.id === "talk-form") {
      event.preventDefault();
      const turn = { asked: form.prompt.value, said: {} };
      const answers = drawTurn(form, turn.asked).map(async ([model, place]) => {
        place.className = "say busy";
        turn.said[model] = await answer(model, form, place).catch(() => {
          place.className = "wrong";
          place.textContent += lost.dataset.gone;
          return null;
        });
      });
      one("#task-prompt").value = form.prompt.value;
      await Promise.all(answers);
      turns.push(turn);
      keepTurns(form);
      form.prompt.value = "";
      form.prompt.focus();
    }
    if (form.id === "task-form") {
      event.preventDefault();
      const fields = new URLSearchParams(new FormData(form));
      fields.set("system", one("#talk-system").value);
      try {
        const reply = await fetch("/talk/task", { method: "POST", body: fields });
        one("[role=status]", form).textContent = reply.ok ? form.dataset.done : await said(reply);
      } catch { one("[role=status]", form).textContent = lost.dataset.gone; }
    }
  });
  document.addEventListener("click", (event) => {
    if (event.target.closest?.("[data-forget]")) {
      turns = [];
      keepTurns(one("#talk-form"));
      one("#turns").replaceChildren();
    }
  });
})();
