"use strict";
// The one script of the studio. Pages work without it, but for live changes, talk and drop.
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const say = (text) => { one("#said").textContent = text; };
  const piece = async (address, options) => {
    const reply = await fetch(address, { credentials: "same-origin", ...options });
    return new DOMParser().parseFromString(await reply.text(), "text/html");
  };

  // Live pieces: sections that have changed take the place of the old ones.
  const live = one("#live");
  const shown = new Map();
  for (const section of live ? all("section[id]", live) : []) shown.set(section.id, section.outerHTML);
  let loading = false, again = false;
  const refresh = async () => {
    if (!live || loading) { again = true; return; }
    loading = true;
    try {
      const view = live.dataset.view ? "?" + new URLSearchParams(new FormData(one(live.dataset.view))) : "";
      const found = await piece(live.dataset.live + (view || location.search));
      const sections = all("section[id]", live.dataset.pick ? one(live.dataset.pick, found)?.parentElement ?? found : found);
      const ids = new Set(sections.map((section) => section.id));
      for (const old of all("section[id]", live)) if (!ids.has(old.id)) { old.remove(); shown.delete(old.id); }
      let last = null;
      for (const section of sections) {
        const old = live.querySelector("#" + CSS.escape(section.id));
        const text = section.outerHTML;
        if (!old) { if (last) last.after(section); else live.prepend(section); }
        else if (shown.get(section.id) !== text && !old.contains(document.activeElement?.closest?.("details, input, textarea, select"))) {
          const open = all("details", old).map((part) => part.open);
          const chosen = new Set(all("input:checked", old).map((box) => box.value));
          old.replaceWith(section);
          all("details", section).forEach((part, index) => { if (open[index]) part.open = true; });
          for (const box of all("input[type=checkbox]", section)) box.checked = chosen.has(box.value);
        }
        shown.set(section.id, text);
        last = live.querySelector("#" + CSS.escape(section.id));
      }
      live.classList.remove("stale");
      for (const input of all("[data-filter]")) filter(input);
    } catch { live.classList.add("stale"); }
    loading = false;
    if (again) { again = false; setTimeout(refresh, 200); }
    more();
  };
  const more = () => { if (live && one("[data-more]", live)) setTimeout(refresh, 100); };  // steps are still being read
  more();
  // One stream for all pages of a browser: the page that holds the lock listens and tells the others. A browser opens
  // few connections to one server, and ten streams would leave none for anything else.
  if (live?.dataset.watch && "locks" in navigator) {
    const channel = new BroadcastChannel("lorafit-studio");
    // `null`: a new stream. What changed before it opened went to a stream that no page read any more.
    const take = (changed) => { if (!changed || changed.includes(live.dataset.watch)) refresh(); };
    channel.onmessage = (event) => take(event.data);
    navigator.locks.request("lorafit-studio-events", () => new Promise(() => {
      const source = new EventSource("/events");
      const tell = (changed) => { channel.postMessage(changed); take(changed); };
      source.onmessage = (event) => tell(JSON.parse(event.data));
      source.onopen = () => tell(null);
      source.onerror = () => live.classList.add("stale");
    }));
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
  const filter = (input) => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of all("tbody tr, label", one(input.dataset.filter) ?? document.createElement("table"))) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  };
  document.addEventListener("input", (event) => { if (event.target.matches?.("[data-filter]")) filter(event.target); });
  document.addEventListener("click", async (event) => {
    const sort = event.target.closest?.("[data-sort]");
    if (sort) {
      const head = sort.closest("th"), table = sort.closest("table"), column = head.cellIndex;
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = all("tbody tr", table).sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    }
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
      const found = await piece(details.dataset.load);
      place.className = "";
      place.replaceChildren(...found.body.childNodes);
    });
  }

  // A new run: problems at their fields and the plan, while one types.
  const fresh = one("#new-form");
  if (fresh) {
    let timer = null, planned = "", number = 0;
    const plan = async (recipe) => {
      if (recipe === planned) return;
      planned = recipe;
      const mine = ++number, place = one("#plan");
      place.innerHTML = "";
      const busy = place.appendChild(document.createElement("p"));
      busy.className = "busy";
      busy.textContent = place.dataset.busy;
      const found = await piece("/new/plan", { method: "POST", body: new URLSearchParams(new FormData(fresh)) });
      if (mine === number) place.replaceChildren(...found.body.childNodes);
    };
    const check = async () => {
      const reply = await fetch("/new/check", { method: "POST", body: new URLSearchParams(new FormData(fresh)) });
      const told = await reply.json();
      for (const place of all(".field .wrong", fresh)) place.textContent = "";
      for (const input of all("[aria-invalid]", fresh)) input.removeAttribute("aria-invalid");
      one("#errors").textContent = "";
      for (const [key, message, hint] of told.errors) {
        const input = key && document.getElementsByName(key)[0];
        const place = input ? one("#e-" + CSS.escape(key.replace(".", "-"))) : one("#errors");
        place.textContent += message + (hint ? ": " + hint : "") + "\n";
        if (input) { input.setAttribute("aria-invalid", "true"); }
      }
      one("aside .command pre", fresh).textContent = told.command;
      one("#recipe").textContent = told.recipe;
      if (told.recipe) plan(told.recipe);
    };
    fresh.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(check, 500); });
    if (one("#recipe").textContent) plan(one("#recipe").textContent);
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
    const PART = 2 ** 21;
    const take = async (file) => {
      const id = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      let path = "";
      for (let offset = 0; offset === 0 || offset < file.size; offset += PART) {
        const last = offset + PART >= file.size ? 1 : 0;
        const query = new URLSearchParams({ name: file.name, id, offset, last });
        const reply = await fetch("/data/upload?" + query, { method: "POST", body: file.slice(offset, offset + PART) });
        if (!reply.ok) { say(drop.dataset.error); drop.append(" " + drop.dataset.error); return; }
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
      if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
    });
    one("[data-pick-file]", drop).addEventListener("change", (event) => { if (event.target.files[0]) take(event.target.files[0]); });
  }

  // Talk: one column per model, each with its own conversation.
  const threads = new Map();
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
    const thread = threads.get(model) ?? [];
    const system = form.system.value.trim();
    const question = { role: "user", content: form.prompt.value };
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...thread, question];
    const asked = { model, messages, temperature: +form.temperature.value, top_p: +form.top_p.value, max_tokens: +form.max_tokens.value };
    const failed = (text) => { place.className = "wrong"; place.textContent = form.dataset.error + ": " + text; };
    let text = "", rest = "";
    const reply = await fetch("/talk/answer", { method: "POST", body: JSON.stringify(asked) });
    if (!reply.ok) { failed((await reply.json()).error.message); return; }
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
        if (event.error) { failed(event.error.message); return; }
        text += event.choices?.[0]?.delta?.content ?? "";
        show(place, text, form.dataset);
      }
    }
    place.classList.remove("busy");
    if (!text.trim()) { place.className = "empty"; place.textContent = form.dataset.nothing; }
    threads.set(model, [...thread, question, { role: "assistant", content: text }]);
  };
  document.addEventListener("submit", async (event) => {
    const form = event.target;
    if (form.id === "talk-form") {
      event.preventDefault();
      const turn = document.createElement("section");
      turn.className = "card turn";
      const asked = turn.appendChild(document.createElement("div"));
      asked.className = "asked";
      asked.textContent = form.prompt.value;
      const row = turn.appendChild(document.createElement("div"));
      row.className = "chat";
      one("#turns").prepend(turn);
      const answers = JSON.parse(form.dataset.models).map((model) => {
        const column = row.appendChild(document.createElement("div"));
        column.appendChild(document.createElement("h3")).textContent = model;
        const place = column.appendChild(document.createElement("div"));
        place.className = "say busy";
        return answer(model, form, place);
      });
      one("#task-prompt").value = form.prompt.value;
      await Promise.all(answers);
      form.prompt.value = "";
      form.prompt.focus();
    }
    if (form.id === "task-form") {
      event.preventDefault();
      const reply = await fetch("/talk/task", { method: "POST", body: new URLSearchParams(new FormData(form)) });
      one("[role=status]", form).textContent = reply.ok ? form.dataset.done : "";
    }
  });
  document.addEventListener("click", (event) => {
    if (event.target.closest?.("[data-forget]")) { threads.clear(); one("#turns").replaceChildren(); }
  });
})();
