"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const TINY = 96; // pixels
  const percent = (share) => (100 * share).toFixed(1) + "%";

  // Text goes through textContent only, so nothing in a name can become markup.
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text) element.textContent = text;
    return element;
  };
  const picture = (index) => {
    const standing = document.querySelector(`img[data-image="${index}"]`);
    if (standing) return standing.src;
    const webp = data.images[index][5];
    return webp ? "data:image/webp;base64," + webp : "";
  };
  const pictures = data.images.filter((_, index) => picture(index)).length;
  const only = `the page has ${pictures.toLocaleString("en")} ${pictures === 1 ? "picture" : "pictures"}`;
  const frame = (index) => {
    if (!pictures) return "";
    const box = make("div", "frame");
    const source = picture(index);
    if (source) {
      const image = make("img");
      image.src = source;
      image.alt = "";
      box.append(image);
    } else box.append(make("span", "nothing", "no picture"));
    return box;
  };
  const says = (index, note) => {
    const [name, label, predicted, confidence, isRight] = data.images[index];
    const all = make("div", "says");
    if (predicted || confidence !== null) {
      const line = make("div");
      const said = (isRight ? "✓ " : "") + (predicted || "no class");
      line.append(make("b", isRight ? "right-text" : "wrong-text", said));
      if (confidence !== null) line.append(" " + percent(confidence));
      all.append(line);
    }
    if (label && !isRight) all.append(make("div", "", "labeled " + label));
    if (note) all.append(make("div", "soft", note));
    all.append(make("span", "path", name));
    return all;
  };

  const dialog = document.getElementById("images");
  if (dialog) {
    const title = dialog.querySelector("h2");
    const count = dialog.querySelector("[data-count]");
    const list = dialog.querySelector("ul");
    document.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-set]");
      if (!button) return;
      const [name, images, total, table, notes] = data.sets[button.dataset.set];
      title.textContent = name;
      count.textContent =
        images.length < total
          ? `${images.length} of ${total.toLocaleString("en")} images; ${table} lists all`
          : total === 1 ? "1 image" : `${total.toLocaleString("en")} images`;
      if (pictures && !images.every(picture)) count.textContent += "; " + only;
      list.replaceChildren(
        ...images.map((index, place) => {
          const item = make("li", "shot");
          item.append(frame(index), says(index, notes[place]));
          return item;
        })
      );
      dialog.showModal();
      dialog.scrollTop = 0;
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog || event.target.closest(".close")) dialog.close();
    });
  }

  for (const map of document.querySelectorAll("[data-map]")) {
    const plot = map.querySelector(".plot");
    const preview = map.querySelector("[data-shown]");
    const views = [...plot.querySelectorAll("[data-view]")];
    let chosen = null;
    let spot = null;
    // Mistakes are drawn last, and come first for the keyboard.
    const all = views.map((view) =>
      [...view.querySelectorAll("[data-gid^=point-]")].reverse().map((element) => ({
        element,
        x: element.x.baseVal.value,
        y: element.y.baseVal.value,
        index: Number(element.dataset.gid.slice(6)),
      }))
    );
    const enlarge = (image) => {
      const times = Math.floor(TINY / Math.max(image.naturalWidth, image.naturalHeight));
      if (times < 2) return;
      image.className = "tiny";
      image.style.width = times * image.naturalWidth + "px";
    };
    const current = () => views.findIndex((view) => !view.hidden);
    const choose = (point) => {
      if (point === chosen) return;
      chosen = point;
      if (spot) spot.remove();
      spot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
      spot.setAttribute("class", "spot");
      spot.setAttribute("r", "6");
      spot.setAttribute("cx", point.x);
      spot.setAttribute("cy", point.y);
      point.element.ownerSVGElement.append(spot);
      const box = frame(point.index);
      const image = box && box.querySelector("img");
      if (image) image.addEventListener("load", () => enlarge(image));
      const why = pictures && !picture(point.index) ? make("div", "soft small", only[0].toUpperCase() + only.slice(1)) : "";
      preview.replaceChildren(box, why, says(point.index));
    };
    const nearest = (event) => {
      const svg = views[current()].querySelector("svg");
      const matrix = svg.getScreenCTM().inverse();
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
      let best = null;
      let least = (16 * matrix.a) ** 2;
      for (const point of all[current()]) {
        const away = (point.x - at.x) ** 2 + (point.y - at.y) ** 2;
        if (away < least) [least, best] = [away, point];
      }
      if (best) choose(best);
    };
    plot.addEventListener("pointermove", nearest);
    plot.addEventListener("pointerdown", nearest);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const points = all[current()];
      if (!step || !points.length) return;
      event.preventDefault();
      const at = points.indexOf(chosen);
      choose(points[at < 0 ? 0 : (at + step + points.length) % points.length]);
    });
    for (const input of map.querySelectorAll("input[name=view]"))
      input.addEventListener("change", () => {
        for (const view of views) view.hidden = view.dataset.view !== input.value;
        if (spot) spot.remove();
        chosen = spot = null;
      });
    if (all[0].length) choose(all[0][0]);
  }

  // Tables that go on to the right say so, since not every device shows a scroll bar.
  for (const box of document.querySelectorAll(".scroll")) {
    const tell = () => {
      const rest = box.scrollWidth - box.clientWidth;
      box.classList.toggle("wider", rest > 1);
      if (box.matches(".drawn")) box.tabIndex = rest > 1 ? 0 : -1;
      box.classList.toggle("more", rest - box.scrollLeft > 1);
    };
    box.addEventListener("scroll", tell, { passive: true });
    new ResizeObserver(tell).observe(box);
  }

  // On paper nothing can be opened.
  const opened = [];
  addEventListener("beforeprint", () => {
    opened.push(...document.querySelectorAll("details:not([open])"));
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened.splice(0)) details.open = false;
  });

  // The contents mark the section that is read: the one that was chosen or clicked in,
  // and after scrolling the last one that begins above the middle of the window.
  const links = new Map();
  for (const link of document.querySelectorAll("nav.wide a"))
    links.set(document.querySelector(link.getAttribute("href")), link);
  const mark = (current) => {
    for (const [section, link] of links)
      if (section === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
  };
  let isChosen = false;
  const follow = () => {
    if (isChosen || !links.size) return;
    const all = [...links.keys()];
    const above = all.filter(
      (one) => one.getBoundingClientRect().top < innerHeight * 0.4
    );
    mark(above.at(-1) ?? all[0]);
  };
  const release = () => (isChosen = false);
  for (const kind of ["wheel", "touchmove", "keydown", "pointerdown"])
    addEventListener(kind, release, { passive: true });
  addEventListener("scroll", follow, { passive: true });
  addEventListener("click", (event) => {
    const all = [...links];
    const found =
      all.find(([, link]) => link.contains(event.target)) ??
      all.find(([section]) => section.contains(event.target));
    if (!found) return;
    mark(found[0]);
    isChosen = true;
  });
  follow();
})();
