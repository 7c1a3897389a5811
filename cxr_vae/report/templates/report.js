
"use strict";
// A picture that is clicked (or Enter is pressed on) opens in a dialog; + and - change its size, Esc closes it.
const dialog = document.getElementById("zoom");
const stage = document.getElementById("stage");
const shown = stage.querySelector("img");
let width = 0;

function resize(factor) {
  width = Math.min(Math.max(width * factor, 120), 8000);
  shown.style.width = `${width}px`;
}

for (const button of document.querySelectorAll("button.zoom")) {
  button.addEventListener("click", () => {
    const image = button.querySelector("img");
    shown.src = image.currentSrc || image.src;
    shown.alt = image.alt;
    shown.className = image.className;
    document.getElementById("zoom-title").textContent =
      button.parentElement.querySelector("figcaption").firstChild.textContent.trim();
    dialog.showModal();
    const ratio = image.getAttribute("width") / image.getAttribute("height");
    const room = stage.clientWidth - 24; // the padding on both sides
    width = Math.min(room, Math.max((stage.clientHeight - 24) * ratio, image.getAttribute("width")));
    resize(1);
    stage.focus();
  });
}
document.getElementById("larger").addEventListener("click", () => resize(1.4));
document.getElementById("smaller").addEventListener("click", () => resize(1 / 1.4));
dialog.addEventListener("keydown", (event) => {
  if (event.key === "+" || event.key === "=") resize(1.4);
  if (event.key === "-") resize(1 / 1.4);
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
