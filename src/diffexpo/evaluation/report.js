// A picture in its own size; a click or the arrow keys flip between the models that drew it.
(() => {
  const large = document.getElementById("large"), [image, words, close] = large.children;
  let all = [], at = 0;
  const show = (next) => {
    at = (next + all.length) % all.length;
    image.src = all[at].src;
    image.alt = all[at].alt;
    words.textContent = `${all[at].dataset.label} (${at + 1} of ${all.length}): ${all[at].alt}`;
  };
  for (const card of document.querySelectorAll(".flip")) {
    const pictures = [...card.querySelectorAll("img")];
    pictures.forEach((picture, index) => {
      picture.tabIndex = 0;
      const open = () => { all = pictures; show(index); large.showModal(); };
      picture.addEventListener("click", open);
      picture.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
    });
  }
  image.addEventListener("click", () => show(at + 1));
  close.addEventListener("click", () => large.close());
  large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
  large.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") show(at + 1);
    if (event.key === "ArrowLeft") show(at - 1);
  });
})();
