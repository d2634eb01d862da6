// The page's own script: tables that sort and search, pictures that grow, one sample at a time.
// Without it the page is complete but for the samples.
"use strict";

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

// ---- Tables: DataTables, from the text of its module, for those that come into view.

let library;
const dataTables = () =>
  (library ??= (async () => {
    const text = document.getElementById("datatables").textContent;
    const url = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
    return (await import(url)).default;
  })());

const SEARCHED = 8; // rows from which a search is worth its place

const enliven = async (table) => {
  const DataTable = await dataTables();
  const nothing = { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null };
  const live = new DataTable(table, {
    paging: false, info: false, autoWidth: false, order: [], layout: nothing,
  });
  if (table.tBodies[0].rows.length >= SEARCHED) {
    const input = make("input", { type: "search" });
    input.addEventListener("input", () => live.search(input.value).draw());
    table.closest(".scroll").before(make("label", { className: "search" }, "Search ", input));
  }
  table.dataset.live = "true";
};

const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    enliven(target);
  }
}, { rootMargin: "600px" });
for (const table of document.querySelectorAll("table.sorted")) seen.observe(table);

// ---- Pictures: each is in the page once; enlarged, it lends its address.

const dialog = document.getElementById("enlarged");
for (const button of document.querySelectorAll("button.enlarge")) {
  button.addEventListener("click", () => {
    const picture = button.querySelector("img");
    Object.assign(dialog.querySelector("img"), { src: picture.src, alt: picture.alt });
    dialog.querySelector("h2").textContent = button.dataset.title;
    dialog.showModal();
  });
}
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});

// ---- Samples: all text is put in as text.

const beside = {}; // what files beside the page hand over, by section and task
globalThis.kvmergeSamples = (section, task, content) => (beside[JSON.stringify([section, task])] = content);

class Browser {
  constructor(root) {
    this.root = root;
    this.about = JSON.parse(root.querySelector("script.about").textContent);
    this.loaded = new Map();
    this.find = (name) => root.querySelector(`[data-is="${name}"]`);
    this.find("task").append(
      ...this.about.tasks.map((one, i) =>
        make("option", { value: i, textContent: `${one.name} (${one.count.toLocaleString("en")})` })),
    );
    this.find("cell").append(
      make("option", { value: -1, textContent: "all cells" }),
      ...this.about.cells.map((name, i) => make("option", { value: i, textContent: name })),
    );
    this.find("task").addEventListener("change", () => this.choose());
    for (const name of ["cell", "flips"]) this.find(name).addEventListener("change", () => this.filter());
    this.find("sample").addEventListener("change", () => this.show(Number(this.find("sample").value)));
    this.find("previous").addEventListener("click", () => this.show(this.at - 1));
    this.find("next").addEventListener("click", () => this.show(this.at + 1));
    if (this.about.full < 0) this.find("flips").disabled = true;
    root.querySelector(".controls").hidden = false;
  }

  async load(index) {
    const { task, file } = this.about.tasks[index];
    if (!this.loaded.has(task)) this.loaded.set(task, file ? this.fetched(task, file) : this.held(index));
    return this.loaded.get(task);
  }

  held(index) {
    return JSON.parse(this.root.querySelectorAll("script.samples")[index].textContent).samples;
  }

  fetched(task, file) {
    return new Promise((resolve, reject) => {
      const script = make("script", { src: file });
      script.addEventListener("load", () =>
        resolve(beside[JSON.stringify([this.about.slug, task])].samples));
      script.addEventListener("error", () => {
        this.loaded.delete(task);
        reject(new Error(`${decodeURIComponent(file)} is not beside this page`));
      });
      document.head.append(script);
    });
  }

  async choose(id) {
    this.started = true;
    const index = Number(this.find("task").value);
    this.find("status").textContent = "loading …";
    try {
      this.samples = await this.load(index);
    } catch (error) {
      this.find("status").textContent = `${error.message}: keep its folder with the page.`;
      this.find("view").replaceChildren();
      return;
    }
    if (Number(this.find("task").value) === index) this.filter(id);
  }

  filter(id) {
    const cell = Number(this.find("cell").value);
    const flipped = this.find("flips").value;
    this.chosen = this.samples.filter(({ flips }) => {
      if (flipped === "all") return true;
      const kinds = cell < 0 ? Object.values(flips) : [flips[cell]].filter(Boolean);
      return flipped === "any" ? kinds.length > 0 : kinds.includes(flipped);
    });
    this.find("sample").replaceChildren(
      ...this.chosen.map((one, i) => make("option", { value: i, textContent: one.id })));
    this.show(Math.max(0, this.chosen.findIndex((one) => one.id === id)));
  }

  show(at) {
    const count = this.chosen.length;
    this.at = Math.min(Math.max(at, 0), count - 1);
    this.find("previous").disabled = this.at <= 0;
    this.find("next").disabled = this.at >= count - 1;
    const task = this.about.tasks[Number(this.find("task").value)];
    if (!count) {
      this.find("status").textContent = `No sample of ${task.name} is so.`;
      this.find("view").replaceChildren();
      return;
    }
    const sample = this.chosen[this.at];
    this.find("sample").value = this.at;
    this.find("status").textContent = `${task.name}: sample ${this.at + 1} of ${count}, ${sample.id}`;
    this.find("view").replaceChildren(...this.prompt(sample), this.gold(sample), this.outputs(sample));
    if (this.ready) {
      const place = [this.about.slug, task.task, sample.id].map(encodeURIComponent).join("/");
      history.replaceState(null, "", `#sample/${place}`);
    }
    this.ready = true;
  }

  prompt({ prompt, tokens }) {
    const heading = make("h5", { textContent: `Prompt (${tokens.toLocaleString("en")} tokens)` });
    if (!prompt) {
      const why = "The prompt’s text was not recorded: the version that made this run kept only its hash.";
      return [heading, make("p", { className: "caption", textContent: why })];
    }
    const [head, tail] = prompt.map((text) => make("pre", { dir: "auto", tabIndex: 0, textContent: text }));
    head.setAttribute("aria-label", prompt[1] ? "Head of the prompt" : "Prompt");
    tail.setAttribute("aria-label", "Tail of the prompt");
    for (const box of [head, tail]) box.setAttribute("role", "region");
    const gap = make("p", { className: "caption", textContent: "… what lies between is not recorded …" });
    return [heading, make("div", { className: "prompt" }, ...(prompt[1] ? [head, gap, tail] : [head]))];
  }

  gold({ answers }) {
    const items = answers.map((text) => make("li", { dir: "auto", textContent: text }));
    const none = make("p", { className: "caption", textContent: "The benchmark gives none." });
    return make("div", { className: "gold" },
      make("h5", { textContent: answers.length > 1 ? "Gold answers" : "Gold answer" }),
      items.length ? make("ul", {}, ...items) : none);
  }

  outputs({ outputs, flips }) {
    const wanted = Number(this.find("cell").value);
    const shown = outputs.filter(([place]) => wanted < 0 || place === wanted || place === this.about.full);
    const alike = new Map(); // seeds that gave the same answer stand together
    for (const [place, seed, text, score, kl, tokens] of shown) {
      const key = JSON.stringify([place, text, score, tokens]);
      if (!alike.has(key)) alike.set(key, { place, text, score, tokens, seeds: [], kls: new Set() });
      alike.get(key).seeds.push(seed);
      alike.get(key).kls.add(kl);
    }
    const cards = new Map();
    for (const { place, text, score, tokens, seeds, kls } of alike.values()) {
      const several = outputs.filter(([other]) => other === place).length > 1;
      const kl = [...kls].join(", ");
      if (!cards.has(place)) {
        const heading = make("h5", { textContent: this.about.cells[place] });
        const kind = flips[place];
        const classes = `card ${kind ?? ""} ${place === this.about.full ? "reference" : ""}`;
        if (kind) heading.append(" ", make("span", { className: "tag", textContent: kind }));
        cards.set(place, make("article", { className: classes }, heading));
      }
      const facts = [
        score === "" ? "score not recorded" : `score ${score}`,
        place === this.about.full ? "" : kl === "" ? "KL not recorded" : `KL ${kl}`,
        `${tokens} tokens`, several ? `seed${seeds.length > 1 ? "s" : ""} ${seeds.join(", ")}` : "",
      ].filter(Boolean).join(" · ");
      const answer = make("p", { className: "answer", dir: "auto", textContent: text || "(empty)" });
      cards.get(place).append(make("p", { className: "facts", textContent: facts }), answer);
    }
    return make("div", { className: "cards" }, ...cards.values());
  }

  // Follow a link to a sample, and say whether it was one of this browser's.
  follow(section, task, id) {
    const index = this.about.tasks.findIndex((one) => one.task === task);
    if (section !== this.about.slug || index < 0) return false;
    this.find("cell").value = -1;
    this.find("flips").value = "all";
    this.find("task").value = index;
    this.ready = true;
    this.choose(id);
    this.root.scrollIntoView();
    return true;
  }
}

const browsers = [...document.querySelectorAll(".browser")].map((root) => new Browser(root));

const follow = () => {
  const [kind, ...place] = location.hash.slice(1).split("/").map(decodeURIComponent);
  return kind === "sample" && browsers.some((browser) => browser.follow(...place));
};
addEventListener("hashchange", follow);
follow();

// Each begins with its first sample when it comes near the window.
const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    const browser = browsers.find(({ root }) => root === target);
    if (!browser.started) browser.choose();
  }
}, { rootMargin: "600px" });
for (const { root } of browsers) near.observe(root);
