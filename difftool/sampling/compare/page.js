"use strict";
const { axes, pictures } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const figures = [...document.querySelectorAll("#store figure")];
const places = new Map(pictures.map((picture, i) => [String(picture.at), i]));

function made(tag, values = {}, ...children) {
  const { dataset, ...rest } = values, node = Object.assign(document.createElement(tag), rest);
  Object.assign(node.dataset, dataset);
  node.append(...children);
  return node;
}

/* --- the tables: which axis runs across, which down, and what is shown of the others --- */

const roles = {
  across: axes.length - 1,
  down: axes.length - 2,
  shown: axes.map(() => -1),  // of each other axis: one value, or all, a table each
};

/* Few pictures are shown larger. */
const WIDE = pictures.length == 1 ? 32 : pictures.length <= 4 ? 18 : 12;
if (WIDE > 12) document.documentElement.style.setProperty("--wide", `${WIDE}rem`);

function tools() {
  const form = $("tools"), choose = (name, value, options, change) => {
    const list = made("select", {}, ...options.map(([text, v]) => new Option(text, v)));
    list.value = value;
    list.addEventListener("change", () => { change(Number(list.value)); tools(); lay(); });
    return made("label", {}, name, list);
  };
  const named = axes.map((axis, i) => [axis.name, i]), parts = [];
  const swap = (role, other) => (axis) => {
    if (axis == roles[other]) roles[other] = roles[role];
    roles[role] = axis;
  };
  if (axes.length > 1) {
    parts.push(choose("across", roles.across, named, swap("across", "down")));
    parts.push(choose("down", roles.down, named, swap("down", "across")));
  }
  axes.forEach((axis, i) => {
    if (axes.length < 3 || i == roles.across || i == roles.down) return;
    const options = [["all", -1], ...axis.texts.map((text, v) => [text, v])];
    parts.push(choose(axis.name, roles.shown[i], options, (v) => { roles.shown[i] = v; }));
  });
  const style = document.documentElement.style, now = parseFloat(style.getPropertyValue("--wide"));
  const size = made("input", { type: "range", min: 4, max: 40, step: .5, value: now || WIDE });
  size.addEventListener("input", () => style.setProperty("--wide", `${size.value}rem`));
  const help = made("button", { type: "button", textContent: pictures.length > 1 ? "compare" : "open", title: "or click a picture" });
  help.addEventListener("click", () => open(current));
  form.replaceChildren(...parts, made("label", {}, "size", size), made("span", { className: "more" }, help));
  form.hidden = false;
}

function combinations() {
  let all = [[]];
  axes.forEach((axis, i) => {
    const fixed = i == roles.across || i == roles.down;
    const values = fixed ? [0] : roles.shown[i] < 0 ? axis.texts.map((_, v) => v) : [roles.shown[i]];
    all = all.flatMap((at) => values.map((v) => [...at, v]));
  });
  return all;
}

function lay() {
  const main = $("tables");
  $("store").append(...figures);
  if (axes.length < 2) {
    main.replaceChildren(made("div", { className: "turn" }, ...figures));
  } else {
    const across = axes[roles.across], down = axes[roles.down];
    main.replaceChildren(...combinations().flatMap((at) => {
      const title = axes.flatMap((axis, i) =>
        i == roles.across || i == roles.down ? [] : [said(i, at[i])]);
      const corner = made("th", {}, made("small", {}, `${across.name} →`), made("small", {}, `${down.name} ↓`));
      const head = made("tr", {}, corner, ...across.texts.map((text) => made("th", { scope: "col" }, text)));
      const rows = down.texts.map((text, y) => made("tr", {}, made("th", { scope: "row" }, text),
        ...across.texts.map((_, x) => {
          const here = [...at];
          here[roles.across] = x;
          here[roles.down] = y;
          const index = places.get(String(here));
          return index === undefined ? made("td") : made("td", {}, figures[index]);
        })));
      const table = made("table", {}, made("thead", {}, head), made("tbody", {}, ...rows));
      return [made("section", {}, ...(title.length ? [made("h2", {}, title.join(" · "))] : []),
        made("div", { className: "scroll" }, table))];
    }));
  }
  main.hidden = false;
  $("store").hidden = true;
}

/* A value of an axis for people: a prompt needs no name. */
function said(axis, value) {
  const { name, texts } = axes[axis];
  return ["prompt", "label"].includes(name) ? texts[value] : `${name} ${texts[value]}`;
}

/* --- the viewer: one picture, or two of them beside, upon or against each other --- */

const MODES = { one: "one", flip: "flip", side: "side by side", wipe: "wipe", difference: "difference" };
let current = 0, kept = null, before = null, mode = "one", flipped = false;
let view = null, cut = .5;  // view: scale and shift of a picture in its pane; null = as it fits

const other = () => kept ?? before ?? neighbour("across", 1) ?? neighbour("across", -1) ?? current;
const source = (index) => figures[index].querySelector("img").src;
const told = (index) => axes.length ? axes.map((_, i) => said(i, pictures[index].at[i]))
  : pictures[index].caption ? pictures[index].caption.split("\n") : [`picture ${index + 1}`];
const named = (index) => told(index).join(" · ");

/* What two pictures have in common, and what of each is its own. */
function apart(a, b) {
  const one = told(a), two = told(b);
  const own = (mine, theirs) => mine.filter((text) => !theirs.includes(text)).join(" · ");
  return [one.filter((text) => two.includes(text)).join(" · "), own(one, two), own(two, one)];
}

function neighbour(role, step) {
  if (axes.length < 2) {
    const index = current + step;
    return role != "table" && index >= 0 && index < pictures.length ? index : undefined;
  }
  const at = [...pictures[current].at];
  if (role != "table") {
    const axis = roles[role];
    do at[axis] += step; while (at[axis] >= 0 && at[axis] < axes[axis].texts.length && !places.has(String(at)));
    return places.get(String(at));
  }
  const all = combinations(), own = (list) => list.filter((_, i) => i != roles.across && i != roles.down);
  const next = all[all.findIndex((each) => String(own(each)) == String(own(at))) + step];
  if (!next) return undefined;
  next[roles.across] = at[roles.across];
  next[roles.down] = at[roles.down];
  return places.get(String(next));
}

const behind = () => document.querySelectorAll("header, #tools, #tables");

function open(index) {
  $("viewer").hidden = false;
  behind().forEach((part) => { part.inert = true; });
  document.body.style.overflow = "hidden";
  go(index);
  $("stage").focus();
}

function close() {
  $("viewer").hidden = true;
  behind().forEach((part) => { part.inert = false; });
  document.body.style.overflow = "";
  history.replaceState(null, "", " ");
  const button = figures[current].querySelector("button");
  button.focus();
  button.scrollIntoView({ block: "nearest", inline: "nearest" });
}

function go(index) {
  if (index === undefined) return;
  if (index != current) before = current;
  current = index;
  flipped = false;
  show();
}

function pane(index, tag, ...more) {
  const picture = made("img", { src: source(index), alt: named(index), draggable: false });
  if (pictures[index].small) picture.className = "small";
  const label = tag ? [made("span", { className: "tag" }, tag)] : [];
  return made("div", { className: "pane" }, picture, ...more, ...label);
}

function show() {
  const a = other(), b = current, stage = $("stage");
  const two = mode != "one" && a != b, [common, ofA, ofB] = apart(a, b);
  if (!two) {
    stage.replaceChildren(pane(b));
  } else if (mode == "flip") {
    stage.replaceChildren(flipped ? pane(a, `A  ${ofA}`) : pane(b, `B  ${ofB}`));
  } else if (mode == "side") {
    stage.replaceChildren(pane(a, `A  ${ofA}`), pane(b, `B  ${ofB}`));
  } else {
    const top = made("img", { src: source(b), alt: named(b), draggable: false, className: `top ${mode}` });
    if (pictures[b].small) top.classList.add("small");
    const right = made("span", { className: "tag right" }, `B  ${ofB}`);
    const line = mode == "wipe" ? [made("i", { className: "line" })] : [];
    const one = pane(a, `A  ${ofA}`, top, ...line, right);
    one.classList.add(mode);
    stage.replaceChildren(one);
  }
  $("where").value = two ? common : named(b);
  for (const button of document.querySelectorAll(".modes button"))
    button.setAttribute("aria-pressed", button.dataset.mode == mode);
  figures.forEach((figure, i) => figure.classList.toggle("here", i == b));
  const save = $("save");
  save.href = source(b);
  save.download = pictures[b].name;
  tell();
  place();
  history.replaceState(null, "", `#${b}${two ? `,${a},${mode}` : ""}`);
}

function tell() {
  const facts = pictures[current].facts, list = made("dl");
  for (const [name, value] of Object.entries(facts))
    if (value !== null && value !== "") list.append(made("dt", {}, name), made("dd", {}, String(value)));
  const copy = made("button", { type: "button", textContent: "copy as a line for --prompts" });
  copy.addEventListener("click", async () => {
    copy.textContent = await copied(JSON.stringify({ schema: 1, ...facts })) ? "copied" : "not copied";
  });
  $("facts").replaceChildren(list, copy);
}

/* Put a text on the clipboard, on pages too that the browser does not trust with it. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = made("textarea", { value: text });
    $("facts").append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/* --- where a picture lies in its pane --- */

const fitted = (box, picture) =>
  Math.min(box.clientWidth / picture.width, box.clientHeight / picture.height);

function place() {
  const boxes = document.querySelectorAll(".pane");
  for (const box of boxes) {
    const picture = pictures[current], fit = fitted(box, picture);
    const scale = view ? view.scale : fit;
    const x = box.clientWidth / 2 - (view ? view.x : .5) * picture.width * scale;
    const y = box.clientHeight / 2 - (view ? view.y : .5) * picture.height * scale;
    for (const image of box.querySelectorAll("img")) {
      image.style.width = `${picture.width}px`;
      image.style.height = `${picture.height}px`;
      image.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
      if (scale >= 2) image.classList.add("small");
    }
    const line = box.querySelector(".line");
    if (line) {
      const at = cut * box.clientWidth, inside = Math.max(0, (at - x) / scale);
      line.style.left = `${at - 1}px`;
      box.querySelector(".top").style.clipPath = `inset(0 0 0 ${inside}px)`;
    }
    $("scale").value = `${Math.round(scale * 100)}%`;
  }
}

function zoom(factor, box = document.querySelector(".pane"), at = null) {
  const picture = pictures[current], old = view ?? { scale: fitted(box, picture), x: .5, y: .5 };
  const scale = Math.min(64, Math.max(.02, old.scale * factor));
  const [dx, dy] = at ? [at[0] - box.clientWidth / 2, at[1] - box.clientHeight / 2] : [0, 0];
  const shift = 1 / old.scale - 1 / scale;  // what is below the pointer stays there
  view = { scale, x: old.x + dx * shift / picture.width, y: old.y + dy * shift / picture.height };
  place();
}

const fingers = new Map();
let pressed = null;
const within = (event, box) => {
  const edge = box.getBoundingClientRect();
  return [event.clientX - edge.left, event.clientY - edge.top];
};

$("stage").addEventListener("wheel", (event) => {
  const box = event.target.closest(".pane");
  if (!box) return;
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? .05 : .0018)), box, within(event, box));
}, { passive: false });

$("stage").addEventListener("pointerdown", (event) => {
  const box = event.target.closest(".pane");
  if (!box) return;
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  box.setPointerCapture(event.pointerId);
  pressed = { box, wipes: mode == "wipe" && !view || event.target.closest(".line"), from: [event.clientX, event.clientY] };
  box.classList.add("drag");
});

$("stage").addEventListener("pointermove", (event) => {
  const last = fingers.get(event.pointerId);
  if (!last || !pressed) return;
  const { box } = pressed, now = [event.clientX, event.clientY];
  if (fingers.size == 2) {
    const [still] = [...fingers].filter(([id]) => id != event.pointerId).map(([, at]) => at);
    const far = (p) => Math.hypot(p[0] - still[0], p[1] - still[1]) || 1;
    const middle = { clientX: (now[0] + still[0]) / 2, clientY: (now[1] + still[1]) / 2 };
    zoom(far(now) / far(last), box, within(middle, box));
  } else if (pressed.wipes) {
    cut = Math.min(1, Math.max(0, within(event, box)[0] / box.clientWidth));
    place();
  } else if (view) {
    const picture = pictures[current];
    view.x -= (now[0] - last[0]) / view.scale / picture.width;
    view.y -= (now[1] - last[1]) / view.scale / picture.height;
    place();
  }
  fingers.set(event.pointerId, now);
});

function lifted(event) {
  if (!fingers.delete(event.pointerId) || !pressed || fingers.size) return;
  const dx = event.clientX - pressed.from[0], dy = event.clientY - pressed.from[1];
  pressed.box.classList.remove("drag");
  if (!view && !pressed.wipes && Math.max(Math.abs(dx), Math.abs(dy)) > 50)  // a swipe
    Math.abs(dx) > Math.abs(dy) ? go(neighbour("across", dx < 0 ? 1 : -1)) : go(neighbour("down", dy < 0 ? 1 : -1));
  pressed = null;
}
$("stage").addEventListener("pointerup", lifted);
$("stage").addEventListener("pointercancel", lifted);
$("stage").addEventListener("dblclick", () => { view = view ? null : { scale: 1, x: .5, y: .5 }; place(); });

/* --- buttons and keys --- */

const set = (name) => { mode = mode == name && name != "flip" ? "one" : name; show(); };
const toggle = (id) => { $(id).hidden = !$(id).hidden; };
const ACTIONS = {
  close: () => {
    const opened = ["help", "facts"].filter((id) => !$(id).hidden);
    opened.length ? opened.forEach(toggle) : close();
  },
  left: () => go(neighbour("across", -1)), right: () => go(neighbour("across", 1)),
  up: () => go(neighbour("down", -1)), down: () => go(neighbour("down", 1)),
  earlier: () => go(neighbour("table", -1)), later: () => go(neighbour("table", 1)),
  in: () => zoom(1.25), out: () => zoom(.8), fit: () => { view = null; place(); },
  pixels: () => { view = { scale: 1, x: .5, y: .5 }; place(); },
  keep: () => { kept = current; if (mode == "one") mode = "side"; show(); },
  facts: () => toggle("facts"), help: () => toggle("help"),
  flip: () => { flipped = mode == "flip" ? !flipped : true; mode = "flip"; show(); },
  side: () => set("side"), wipe: () => set("wipe"), difference: () => set("difference"),
};
const KEYS = {
  Escape: "close", ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down",
  PageUp: "earlier", PageDown: "later", "+": "in", "=": "in", "-": "out", 0: "fit", 1: "pixels",
  " ": "flip", f: "flip", a: "keep", s: "side", w: "wipe", d: "difference", i: "facts", "?": "help",
};

document.querySelector(".modes").append(...Object.entries(MODES).map(([name, text]) => {
  const button = made("button", { type: "button", textContent: text, dataset: { mode: name } });
  button.addEventListener("click", () => {
    if (name == "flip") ACTIONS.flip(); else { mode = name; show(); }
  });
  return button;
}));
document.querySelector(".modes").hidden = document.querySelector("[data-do=keep]").hidden = pictures.length < 2;
for (const button of document.querySelectorAll("[data-do]"))
  button.addEventListener("click", () => ACTIONS[button.dataset.do]());

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ($("viewer").hidden) {
    if (event.target.closest("select, input")) return;
    const side = { ArrowLeft: ["across", -1], ArrowRight: ["across", 1], ArrowUp: ["down", -1], ArrowDown: ["down", 1] };
    const step = side[event.key], figure = event.target.closest?.("figure");
    if (step && figure) {
      current = figures.indexOf(figure);
      const next = neighbour(...step);
      if (next === undefined) return;
      event.preventDefault();
      current = next;
      figures[next].querySelector("button").focus();
    }
    return;
  }
  const action = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
  if (!action || (event.key == " " && event.target.closest("button, a"))) return;
  event.preventDefault();
  ACTIONS[action]();
});
addEventListener("resize", () => { if (!$("viewer").hidden) place(); });

figures.forEach((figure, i) => {
  const button = figure.querySelector("button");
  button.setAttribute("aria-label", named(i));
  button.addEventListener("click", () => open(i));
});
tools();
lay();
const [first, second, how] = location.hash.slice(1).split(",");
if (first && figures[first]) {
  kept = figures[second] ? Number(second) : null;
  mode = how in MODES ? how : "one";
  open(Number(first));
}
