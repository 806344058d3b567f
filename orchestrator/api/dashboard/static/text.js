// Text as it may be shown: what is unseen becomes a sign. The same rule as shown.py's `visible`.

const UNSEEN = /\r(?!\n)|[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]|\udb40[\udc00-\udc7f]/g;

function sign(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  return "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

// Nodes for the text; nothing in it is ever read as markup.
export function visible(text) {
  const made = document.createDocumentFragment();
  let at = 0;
  for (const found of text.matchAll(UNSEEN)) {
    made.append(text.slice(at, found.index));
    const span = document.createElement("span");
    span.className = "unseen";
    span.textContent = sign(found[0]);
    made.append(span);
    at = found.index + found[0].length;
  }
  made.append(text.slice(at));
  return made;
}

export function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
