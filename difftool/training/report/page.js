for (const slider of document.querySelectorAll(".sheets input")) {
  const box = slider.closest(".sheets"), images = box.querySelectorAll("img");
  slider.addEventListener("input", () => {
    images.forEach((image, i) => { image.hidden = i != slider.value; });
    box.querySelector("output").value = images[slider.value].dataset.step;
  });
}
