"use strict";

const find = (id) => document.getElementById(id);
let latest = 0; // the number of the last image: an answer to an earlier one is not shown

function showStatus(text, isError) {
  find("status").textContent = text;
  find("status").classList.toggle("error", isError);
}

function showClasses(classes) {
  const rows = classes.map(({ label, probability }) => {
    const row = document.createElement("tr");
    const [name, bar, percent] = ["th", "td", "td"].map((tag) => row.appendChild(document.createElement(tag)));
    name.scope = "row";
    name.textContent = label;
    bar.appendChild(document.createElement("progress")).value = probability;
    bar.firstChild.ariaHidden = "true"; // the number beside it says the same
    percent.textContent = `${(100 * probability).toFixed(1)} %`;
    return row;
  });
  find("results").tBodies[0].replaceChildren(...rows);
  find("results").hidden = rows.length === 0;
}

function showImage(file) {
  const preview = find("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.alt = file.name;
  preview.hidden = false;
}

async function classify(file) {
  const number = ++latest;
  find("name").textContent = file.name;
  showImage(file);
  showClasses([]);
  showStatus("The image is being classified.", false);
  let answer;
  let content;
  try {
    content = await file.arrayBuffer();
  } catch {
    answer = { error: "The file cannot be read." }; // for example a folder
  }
  try {
    const headers = { "Content-Type": "application/octet-stream", "X-File-Name": encodeURIComponent(file.name) };
    answer ??= await (await fetch("classify", { method: "POST", headers, body: content })).json();
  } catch {
    answer = { error: "The server does not answer. Is `odcheap demo` still running?" };
  }
  if (number !== latest) return;
  showClasses(answer.classes ?? []);
  showStatus(answer.error ?? "", "error" in answer);
}

async function describeExport() {
  const { title, accuracy, file, classes } = await (await fetch("export.json")).json();
  document.title = `${title} · odcheap demo`;
  find("title").textContent = title;
  find("accuracy").textContent = [accuracy, file].filter(Boolean).join(" · ");
  find("count").textContent = `The ${classes.length} classes`;
  find("classes").textContent = classes.join(", ");
}

// A browser would leave the page to show a dropped file.
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
  });
}
document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer.files;
  if (file) classify(file);
});
find("choose").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) classify(file);
  event.target.value = ""; // so that the same file can be chosen again
});
find("preview").addEventListener("load", ({ target }) => {
  target.classList.toggle("small", target.naturalHeight < 100); // shows the pixels as they are
});
find("preview").addEventListener("error", () => {
  find("preview").hidden = true; // a format that the network's decoder reads and the browser does not, such as TIFF
});
describeExport();
