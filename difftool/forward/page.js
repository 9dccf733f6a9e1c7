"use strict";

// --- numbers ---------------------------------------------------------------------------------

const logSnr = ([, alpha, sigma]) =>
  alpha === 0 ? -Infinity : sigma === 0 ? Infinity : 2 * Math.log(alpha / sigma);
const decibels = (level) => (10 * logSnr(level)) / Math.LN10;
const share = ([, alpha, sigma]) => alpha ** 2 / (alpha ** 2 + sigma ** 2);
const psnr = (rmse) => (rmse === 0 ? Infinity : 20 * Math.log10(2 / rmse));

function typeset(value, digits) {
  const text = Number.isFinite(value) ? Math.abs(value).toFixed(digits) : "∞";
  return (value < 0 && !/^[0.]+$/.test(text) ? "−" : "") + text;
}

const short = (t) => (Math.abs(t) >= 100 ? t.toFixed(0) : String(Number(t.toPrecision(3))));

// Whatever is read off at a level: name and value.
function readings(level, error) {
  const found = [
    ["t", level[0] < 0 ? "clean" : short(level[0])],
    ["α", level[1].toFixed(4)],
    ["σ", level[2] >= 100 ? level[2].toFixed(1) : level[2].toFixed(4)],
    ["SNR", typeset(decibels(level), 1) + " dB"],
    ["log SNR", typeset(logSnr(level), 2)],
  ];
  if (error !== undefined) {
    found.push(["RMSE", error.toFixed(3)], ["PSNR", typeset(psnr(error), 1) + " dB"]);
  }
  return found;
}

// The level of a strip at a place of the slider, which has `last` + 1 of them.
const indexAt = (strip, place, last) =>
  Math.round((place / Math.max(last, 1)) * (strip.levels.length - 1));

// --- pictures --------------------------------------------------------------------------------

function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

// x_t = alpha x0 + sigma z as RGBA; where the variance grows (EDM), at unit variance.
function mix(x0, z, step, [, alpha, sigma], rgba) {
  const unit = 1 / Math.max(1, Math.hypot(alpha, sigma));
  const signal = alpha * unit;
  const noise = sigma * unit * step * 127.5;
  const grey = 127.5 * (1 - signal);
  for (let from = 0, to = 0; from < x0.length; from += 3, to += 4) {
    rgba[to] = signal * x0[from] + noise * z[from] + grey;
    rgba[to + 1] = signal * x0[from + 1] + noise * z[from + 1] + grey;
    rgba[to + 2] = signal * x0[from + 2] + noise * z[from + 2] + grey;
    rgba[to + 3] = 255;
  }
  return rgba;
}

// --- the plot --------------------------------------------------------------------------------

const FRAME = { left: 38, right: 392, top: 14, bottom: 268 };
const LIMIT = 14;
const across = (way) => FRAME.left + way * (FRAME.right - FRAME.left);
const down = (value) =>
  FRAME.top + ((1 - Math.max(-1, Math.min(1, value / LIMIT))) / 2) * (FRAME.bottom - FRAME.top);

// The log SNR of levels as an SVG path; it ends where it leaves the plot.
function outline(levels) {
  const points = levels.map((level, i) => [i / Math.max(levels.length - 1, 1), logSnr(level)]);
  return points
    .filter(([, value]) => Number.isFinite(value))
    .map(([way, value], i) => `${i ? "L" : "M"}${across(way).toFixed(2)} ${down(value).toFixed(2)}`)
    .join("");
}

// --- the page --------------------------------------------------------------------------------

function start(data) {
  const $ = (id) => document.getElementById(id);
  const make = (name, attributes = {}, ...children) => {
    const svg = ["line", "text", "path", "circle"].includes(name);
    const node = svg
      ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const slider = $("slider");
  const last = Math.max(...data.strips.map((strip) => strip.levels.length)) - 1;
  const x0 = data.x0 && bytes(data.x0);
  const z = data.z && new Int8Array(bytes(data.z).buffer);
  let chosen = 0;
  let tabled = null;
  let playing = null;

  for (const name of ["title", "note", "caption"]) $(name).replaceChildren(...subscripts(data[name]));
  slider.max = last;

  // Of paths compared, one is seen at a time; views of one path are seen together.
  const seen = data.width ? (data.comparison ? [data.strips[0]] : data.strips) : [];
  const views = seen.map((strip) => {
    const canvas = make("canvas", { width: data.width, height: data.height });
    const side = Math.max(data.width, data.height);
    const zoom = Math.max(1, Math.round((seen.length > 1 ? 256 : 512) / side));
    canvas.classList.toggle("large", zoom > 1);
    const fill = make("div");
    const bar = make("div", { class: "bar" }, fill);
    const figure = make("figure", { class: "own" }, canvas, bar);
    figure.style.width = `${data.width * zoom}px`;
    if (seen.length > 1) {
      const title = make("b", {}, ...subscripts(strip.title));
      figure.prepend(make("figcaption", {}, title, " ", ...subscripts(strip.note)));
    }
    $("pictures").append(figure);
    return { figure, fill, bar, pen: canvas.getContext("2d"), strip };
  });
  document.querySelector("main").classList.toggle("alone", !views.length);
  document.querySelector(".stage").hidden =
    !views.length && !data.comparison && !data.strips[0].visited.length;
  for (const strip of data.strips) {
    strip.pictures = strip.frames.map((uri) => {
      const picture = new Image();
      picture.onload = () => show();
      picture.src = uri;
      return picture;
    });
  }

  const choices = !data.comparison ? [] : data.strips.map((strip, k) => {
    const button = make("button", { type: "button", role: "radio", class: "own" }, strip.title);
    button.style.setProperty("--own", strip.color);
    button.onclick = () => choose(k);
    $("choices").append(button);
    return button;
  });

  // Without a picture there is room for the levels that a sampler visits; a click goes there.
  function tabulate(strip) {
    const head = ["", ...readings(strip.levels[0]).map(([name]) => name)];
    const body = strip.visited.map((level, k) => {
      const cells = [k, ...readings(level).map(([, value]) => value)];
      const row = make("tr", {}, ...cells.map((text) => make("td", {}, text)));
      row.onclick = () => move(Math.round(strip.dots[k] * last));
      return row;
    });
    const names = make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)));
    const table = make("table", { class: "own" }, make("thead", {}, names), make("tbody", {}, ...body));
    table.style.setProperty("--own", strip.color);
    $("pictures").replaceChildren(table);
  }

  const plot = $("plot");
  for (const value of [-10, -5, 0, 5, 10]) {
    const y = down(value);
    plot.append(make("line", { x1: FRAME.left, x2: FRAME.right, y1: y, y2: y, class: "grid" }));
    plot.append(make("text", { x: FRAME.left - 7, y: y + 4, "text-anchor": "end" }, typeset(value, 0)));
  }
  const times = (data.whole ?? data.strips[0].levels).map(([t]) => `t = ${short(t)}`);
  const ends = data.comparison ? ["picture", "static"] : [times[0], times.at(-1)];
  plot.append(make("text", { x: FRAME.left, y: 290 }, ends[0]));
  plot.append(make("text", { x: FRAME.right, y: 290, "text-anchor": "end" }, ends[1]));
  plot.append(make("text", { x: FRAME.right, y: 10, "text-anchor": "end" }, "log SNR"));
  const drawn = data.comparison ? data.strips : data.strips.slice(0, 1);
  const curves = drawn.map((strip) => {
    const curve = make("path", { class: "curve own", d: outline(data.whole ?? strip.levels) });
    const dots = strip.dots.map((way) => {
      const level = strip.levels[Math.round(way * (strip.levels.length - 1))];
      return make("circle", { cx: across(way), cy: down(logSnr(level)), r: 3.2, class: "own" });
    });
    for (const node of [curve, ...dots]) node.style.setProperty("--own", strip.color);
    plot.append(curve, ...dots);
    return curve;
  });
  const dot = make("circle", { r: 6.5, "stroke-width": 2, class: "own" });
  plot.append(dot);

  function show() {
    const place = Number(slider.value);
    const strip = data.strips[data.comparison ? chosen : 0];
    const index = indexAt(strip, place, last);
    const level = strip.levels[index];
    for (const view of views) {
      const own = data.comparison ? strip : view.strip;
      const at = indexAt(own, place, last);
      if (x0) {
        const image = view.pen.createImageData(data.width, data.height);
        mix(x0, z, data.step, own.levels[at], image.data);
        view.pen.putImageData(image, 0, 0);
      } else if (own.pictures[at].complete) {
        view.pen.drawImage(own.pictures[at], 0, 0);
      }
      view.bar.style.visibility = own.errors.length ? "hidden" : "visible";
      view.fill.style.width = `${100 * share(own.levels[at])}%`;
      view.figure.style.setProperty("--own", own.color);
    }
    const error = data.strips.map((each) => each.errors[index]).find((value) => value !== undefined);
    $("readings").replaceChildren(...readings(level, error).map(([name, value]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, value))));
    const way = strip.positions ? strip.positions[index] : index / Math.max(strip.levels.length - 1, 1);
    dot.setAttribute("cx", across(way));
    dot.setAttribute("cy", down(logSnr(level)));
    for (const node of [dot, $("slider").parentNode]) node.style.setProperty("--own", strip.color);
    slider.setAttribute("aria-valuetext", `t ${short(level[0])}, SNR ${typeset(decibels(level), 1)} dB`);
    if (!views.length && strip.visited.length && tabled !== strip) tabulate((tabled = strip));
    if (data.comparison) $("note").replaceChildren(...subscripts(strip.note));
    curves.forEach((curve, k) => curve.classList.toggle("other", data.comparison && k !== chosen));
    choices.forEach((button, k) => button.setAttribute("aria-checked", String(k === chosen)));
  }

  function choose(k) {
    chosen = k;
    show();
  }

  function move(to) {
    slider.value = Math.max(0, Math.min(last, to));
    show();
  }

  // All levels in five seconds, from the picture on.
  function play(on) {
    if (playing !== null) cancelAnimationFrame(playing);
    playing = null;
    $("sign").setAttribute("d", on ? "M4 3h4v14H4zM12 3h4v14h-4z" : "M5 3l12 7-12 7z");
    $("play").setAttribute("aria-label", on ? "Pause" : "Play");
    if (!on) return;
    const from = Number(slider.value) >= last ? 0 : Number(slider.value);
    let begun = null;
    const tick = (now) => {
      begun ??= now;
      const to = from + ((now - begun) / 5000) * last;
      move(Math.round(to));
      if (to < last) playing = requestAnimationFrame(tick);
      else play(false);
    };
    playing = requestAnimationFrame(tick);
  }

  slider.oninput = () => {
    play(false);
    show();
  };
  $("play").onclick = () => play(playing === null);
  const drag = (event) => {
    if (!event.buttons) return;
    const box = plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 400;
    play(false);
    move(Math.round(((x - FRAME.left) / (FRAME.right - FRAME.left)) * last));
  };
  plot.onpointerdown = drag;
  plot.onpointermove = drag;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 };
    const pages = { PageDown: -1, PageUp: 1 };
    const place = Number(slider.value);
    if (event.key === " " && event.target.tagName !== "BUTTON") play(playing === null);
    else if (data.comparison && data.strips[Number(event.key) - 1]) choose(Number(event.key) - 1);
    else if (event.target === slider) return; // which has keys of its own
    else if (steps[event.key]) move(place + steps[event.key]);
    else if (pages[event.key]) move(place + pages[event.key] * Math.ceil(last / 10));
    else if (event.key === "Home") move(0);
    else if (event.key === "End") move(last);
    else return;
    event.preventDefault();
  });
  play(false);
  show();
}

// Text with its subscript characters as sub elements, which every font has.
function subscripts(text) {
  const lowered = { "₀": "0", "₁": "1", "₋": "−", "ₜ": "t" };
  return text.split(/([₀₁₋ₜ]+)/).filter(Boolean).map((part) => {
    if (!(part[0] in lowered)) return part;
    const node = document.createElement("sub");
    node.textContent = Array.from(part, (c) => lowered[c]).join("");
    return node;
  });
}

if (typeof document === "undefined") {
  module.exports = { bytes, decibels, indexAt, mix, outline, psnr, readings, short, typeset };
} else {
  start(JSON.parse(document.getElementById("data").textContent));
}
