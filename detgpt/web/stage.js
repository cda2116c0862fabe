// Pointing at a box or at a target lets the other boxes fade; a click on a target keeps it so, Escape ends it.
let kept = null;

function show(target) {
	const figure = element.querySelector(".stage");
	if (!figure) return;
	figure.classList.toggle("pointed", target !== null);
	for (const part of figure.querySelectorAll("[data-target]")) {
		part.classList.toggle("on", part.dataset.target === target);
		if (part.matches("button")) part.setAttribute("aria-pressed", String(part.dataset.target === kept));
	}
}

const targetAt = (event) => event.target.closest?.("[data-target]:not([disabled])")?.dataset.target ?? null;

element.addEventListener("pointerover", (event) => show(targetAt(event) ?? kept));
element.addEventListener("pointerleave", () => show(kept));
element.addEventListener("focusin", (event) => show(targetAt(event) ?? kept));
element.addEventListener("focusout", () => show(kept));
element.addEventListener("click", (event) => {
	const target = targetAt(event);
	kept = target === kept ? null : target;
	show(kept);
});
element.addEventListener("keydown", (event) => {
	if (event.key !== "Escape") return;
	kept = null;
	show(null);
});
watch("value", () => {
	kept = null;
});
