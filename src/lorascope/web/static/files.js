// A dropped or chosen adapter file: sent as it is, with how far it is. Without this, the form sends it.
"use strict";
(() => {
  const form = document.querySelector("form[data-upload]");
  const input = form.querySelector("input[type=file]");
  const said = form.querySelector("[data-said]");
  const bar = form.querySelector("progress");
  const stop = form.querySelector("[data-stop]");
  const button = form.querySelector("button.main");
  let underWay = null;

  input.multiple = true;
  button.hidden = true; // what is chosen is sent at once

  const show = (text, kind = "small") => { said.textContent = text; said.className = kind; };
  const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;

  const send = (file) => new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    underWay = request;
    request.open("POST", form.dataset.upload + encodeURIComponent(file.name));
    request.setRequestHeader("X-CSRF-Token", form.dataset.csrf);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.setRequestHeader("HX-Request", "true"); // an error is a line then, not a page
    request.upload.addEventListener("progress", (event) => {
      bar.value = event.total ? (100 * event.loaded) / event.total : 0;
      show(`${file.name}: ${megabytes(event.loaded)} of ${megabytes(event.total)}`);
    });
    request.addEventListener("load", () => {
      try {
        done(JSON.parse(request.responseText));
      } catch {
        failed(new Error(new DOMParser().parseFromString(request.responseText, "text/html").body.textContent.trim()));
      }
    });
    request.addEventListener("error", () => failed(new Error(`${file.name}: the server took no more of it: see whether it runs, then send it again`)));
    request.addEventListener("abort", () => failed(new Error(`${file.name}: stopped; nothing of it was kept`)));
    request.send(file);
  });

  const sendAll = async (files) => {
    if (underWay || !files.length) return;
    bar.hidden = stop.hidden = false;
    let last = null;
    try {
      for (const file of files) last = await send(file);
      location.assign(files.length === 1 ? last.view : "/files");
    } catch (error) {
      show(error.message, "notice");
      input.value = "";
    }
    bar.hidden = stop.hidden = true;
    underWay = null;
  };

  input.addEventListener("change", () => sendAll([...input.files]));
  form.addEventListener("submit", (event) => { event.preventDefault(); sendAll([...input.files]); });
  stop.addEventListener("click", () => underWay && underWay.abort());
  for (const name of ["dragenter", "dragover"]) {
    form.addEventListener(name, (event) => { event.preventDefault(); form.classList.add("over"); });
  }
  for (const name of ["dragleave", "drop"]) form.addEventListener(name, () => form.classList.remove("over"));
  form.addEventListener("drop", (event) => { event.preventDefault(); sendAll([...event.dataTransfer.files]); });
  addEventListener("dragover", (event) => event.preventDefault()); // beside the form, a drop would open the file
  addEventListener("drop", (event) => event.preventDefault());
})();
