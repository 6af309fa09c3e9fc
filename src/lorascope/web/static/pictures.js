// Sending files one by one with progress, chosen or dropped; without this a form sends them all at once.
"use strict";
(() => {
  const stem = (name) => name.replace(/\.[^.]*$/, "");
  const isCaption = (name) => /\.(txt|caption)$/i.test(name);

  const send = (address, file, progressed, looking) => new Promise((resolve) => {
    const request = new XMLHttpRequest();
    request.open("POST", address);
    request.setRequestHeader("X-CSRF-Token", JSON.parse(document.body.getAttribute("hx-headers"))["X-CSRF-Token"]);
    request.setRequestHeader("HX-Request", "true"); // errors come as a notice
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.addEventListener("progress", (event) => progressed(event.loaded));
    request.upload.addEventListener("load", () => looking());
    request.addEventListener("load", () => {
      const isJson = (request.getResponseHeader("Content-Type") || "").startsWith("application/json");
      if (isJson && request.status === 200) return resolve(JSON.parse(request.responseText));
      const text = new DOMParser().parseFromString(request.responseText, "text/html").body.textContent.trim();
      resolve({ error: text || `not taken (${request.status})` });
    });
    request.addEventListener("error", () => resolve({ error: "the server does not answer: start it again, then send once more" }));
    request.send(file);
  });

  const outcome = (form, taken, folder) => {
    const place = form.querySelector(".outcome");
    place.replaceChildren();
    const add = (kind, text, parent = place) => {
      const node = document.createElement(kind);
      node.textContent = text;
      parent.append(node);
      return node;
    };
    add("p", `Pictures taken: ${taken.pictures}. Captions taken: ${taken.captions}. Left out: ${taken.leftOut.length}.`);
    const list = add("ul", "");
    for (const [name, reason] of taken.leftOut.slice(0, 500)) add("li", `${name}: ${reason}`, list);
    if (taken.leftOut.length > 500) add("p", `And ${taken.leftOut.length - 500} more.`);
    if (folder) {
      const link = add("a", "To the set");
      link.className = "act main";
      link.href = `/pictures/set?folder=${encodeURIComponent(folder)}`;
    }
  };

  // All files below what was dropped, each with the path that it has there.
  const filesBelow = async (entry, above = "") => {
    const found = (make) => new Promise((resolve, reject) => make(resolve, reject));
    if (entry.isFile) return [{ file: await found((ok, no) => entry.file(ok, no)), path: above + entry.name }];
    const reader = entry.createReader();
    const entries = [];
    for (let some = [null]; some.length;) {
      some = await found((ok, no) => reader.readEntries(ok, no)); // gives at most a hundred at once
      entries.push(...some);
    }
    const parts = await Promise.all(entries.map((inner) => filesBelow(inner, `${above}${entry.name}/`)));
    return parts.flat();
  };

  const dropped = async (transfer) => {
    const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean); // before anything waits
    if (!entries.length) return [...transfer.files].map((file) => ({ file, path: file.name }));
    const files = (await Promise.all(entries.map((entry) => filesBelow(entry)))).flat();
    // Of a single folder its own name says nothing new.
    const whole = entries.length === 1 && entries[0].isDirectory ? entries[0].name.length + 1 : 0;
    return files.map(({ file, path }) => ({ file, path: path.slice(whole) }));
  };

  const sendAll = async (form, files) => {
    const name = form.elements.name.value.trim();
    const [bar, said] = form.querySelectorAll("progress, .progress [role=status]");
    const button = form.querySelector("button");
    const names = new Map(); // of pictures, as they are called in the set
    const taken = { pictures: 0, captions: 0, leftOut: [] };
    const total = files.reduce((sum, { file }) => sum + file.size, 0) || 1;
    let sent = 0;
    let folder = "";
    form.querySelector(".progress").hidden = false;
    button.disabled = true;
    const leaving = (event) => event.preventDefault();
    window.addEventListener("beforeunload", leaving);
    files.sort((one, other) => isCaption(one.path) - isCaption(other.path));
    for (const [index, { file, path }] of files.entries()) {
      said.textContent = `${index + 1} of ${files.length}: ${path}`;
      const query = new URLSearchParams({ file: path });
      if (isCaption(path) && names.has(stem(path))) query.set("beside", names.get(stem(path)));
      const address = `/pictures/upload/${encodeURIComponent(name)}?${query}`;
      const answer = await send(address, file, (loaded) => { bar.value = (sent + loaded) / total; },
        () => { if (/\.zip$/i.test(file.name)) said.textContent = `${file.name} is sent and is being unpacked`; });
      sent += file.size;
      bar.value = sent / total;
      if (answer.error) {
        taken.leftOut.push([path, answer.error]);
        if (/disk is full|does not answer/.test(answer.error)) break;
        continue;
      }
      folder = answer.folder;
      taken.pictures += answer.pictures.length;
      taken.captions += answer.captions.length;
      taken.leftOut.push(...answer.left_out);
      if (answer.pictures.length === 1 && !names.has(stem(path))) names.set(stem(path), answer.pictures[0]);
    }
    window.removeEventListener("beforeunload", leaving);
    button.disabled = false;
    said.textContent = taken.leftOut.length ? "Done, but not all" : "Done";
    if (!taken.leftOut.length && folder) location.assign(`/pictures/set?folder=${encodeURIComponent(folder)}`);
    else outcome(form, taken, folder);
  };

  for (const form of document.querySelectorAll("form[data-upload]")) {
    const input = form.querySelector("input[type=file]");
    const drop = form.querySelector(".drop");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      sendAll(form, [...input.files].map((file) => ({ file, path: file.name })));
    });
    for (const kind of ["dragover", "dragenter"]) drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", async (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      const files = await dropped(event.dataTransfer);
      if (files.length && form.elements.name.reportValidity()) sendAll(form, files);
    });
  }
})();
