// The page of `easydel-ragged demo --serve` in a headless browser. No session of nox has one, so this is run by hand,
// against a server that runs, in a folder where npm has installed puppeteer-core and @sparticuz/chromium:
//
//     node chat_in_browser.mjs http://127.0.0.1:8000/ [folder for screenshots]
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [url, folder] = process.argv.slice(2);
process.env.AWS_LAMBDA_JS_RUNTIME ??= "nodejs20.x"; // the package unpacks its libraries for this one
const browser = await puppeteer.launch({
  args: [...chromium.args, "--no-sandbox"],
  executablePath: await chromium.executablePath(),
  headless: "shell",
  defaultViewport: { width: 1100, height: 800 },
});
const page = await browser.newPage();
const errors = [];
const hosts = new Set();
page.on("pageerror", (error) => errors.push(String(error)));
page.on("request", (request) => hosts.add(new URL(request.url()).host));

let failed = 0;
function check(what, right, got) {
  failed += !right;
  console.log(right ? "ok   " : "WRONG", what, got === undefined ? "" : JSON.stringify(got));
}

const text = (selector) => page.$eval(selector, (element) => element.textContent);
const last = (selector) => text(`.assistant:last-child ${selector}`);
const field = () => page.$eval("#question", (element) => element.value);
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const shot = async (name) => folder && page.screenshot({ path: `${folder}/${name}.png` });
const idle = () =>
  page.waitForFunction(() => document.getElementById("talk").getAttribute("aria-busy") === "false", { timeout: 300000 });

async function ask(question) {
  await page.type("#question", question);
  await page.keyboard.press("Enter");
}

await page.goto(url, { waitUntil: "load" });
await page.waitForSelector("#facts code");
const about = await page.evaluate(async () => (await fetch("/about")).json());
check("names the model and the kernel", (await text("#facts")).includes(about.kernel), await text("header"));
check("begins in the field", (await page.evaluate(() => document.activeElement.id)) === "question");

await ask("Write a very long story about a forest and its animals.");
const lengths = new Set();
for (let i = 0; i < 400 && lengths.size < 4; i++) {
  lengths.add((await last(".text")).length);
  await sleep(20);
}
check("streams", lengths.size >= 4, [...lengths]);
await shot("streaming");
await page.keyboard.press("Escape");
await idle();
check("Escape stops", (await last(".note")) === "stopped");
check("keeps the field empty after a part of an answer", (await field()) === "");
await sleep(1000);
const health = await page.evaluate(async () => (await fetch("/health")).json());
check("and the engine, too", health.running_requests === 0, health.running_requests);

await page.setViewport({ width: 360, height: 640 });
check("fits a phone", (await page.evaluate(() => document.documentElement.scrollWidth)) === 360);
await shot("phone");
await page.setViewport({ width: 1100, height: 800 });

await page.focus("#new");
const order = [];
for (let i = 0; i < 3; i++) {
  order.push(await page.evaluate(() => document.activeElement.id));
  await page.keyboard.press("Tab");
}
check("is reached by Tab", order.join() === "new,view,question", order);
await page.focus("#new");
await page.keyboard.press("Enter");
check("begins a new chat", (await page.$$(".message")).length === 0);
check("with the hint", (await text("#talk")).includes("Enter sends"));

// Answers that no server gives, or not when one wants them.
const delta = (content) => `data: ${JSON.stringify({ choices: [{ delta: { content } }] })}\n\n`;
const stream = (body) => ({ status: 200, contentType: "text/event-stream", body });
const html = '<img src=x onerror="window.ran=1"><script>window.ran=1</script>';
const cases = {
  "an answer of HTML": [stream(`${delta(html.slice(0, 40))}${delta(html.slice(40))}data: [DONE]\n\n`), html],
  "a server that is busy": [
    { status: 503, contentType: "application/json", body: '{"detail":"busy"}' },
    "The server answered 503: busy",
  ],
  "an answer that breaks off": [stream(delta("Par")), "Par\nThe answer broke off. The terminal of the server may say why."],
  "an error in the stream": [stream('data: {"error":{"message":"out of pages"}}\n\n'), "out of pages"],
  "no server": [null, "The server can't be reached. Does it still run?"],
};
let answer = null;
await page.setRequestInterception(true);
page.on("request", (request) => {
  if (!request.url().endsWith("/v1/chat/completions")) request.continue();
  else if (answer) request.respond(answer);
  else request.abort();
});
for (const [name, [given, wanted]] of Object.entries(cases)) {
  answer = given;
  await ask("x");
  await idle();
  check(name, (await last(".text")) === wanted, await last(".text"));
  // A question that got no answer is in the field again.
  const again = wanted === html || wanted.startsWith("Par\n") ? "" : "x";
  check("  and the field", (await field()) === again, await field());
  await page.$eval("#question", (element) => { element.value = ""; });
}
answer = stream(delta("never the end"));
await page.evaluate(() => {
  const composing = new KeyboardEvent("keydown", { key: "Escape", isComposing: true, bubbles: true });
  const aborted = [];
  const abort = AbortController.prototype.abort;
  AbortController.prototype.abort = function () { aborted.push(this); return abort.call(this); };
  window.aborts = () => aborted.length;
  window.composes = () => document.dispatchEvent(composing);
});
await page.type("#question", "x");
await page.keyboard.press("Enter");
await page.evaluate(() => window.composes());
check("Escape of an input method stops nothing", (await page.evaluate(() => window.aborts())) === 0);
await idle();
check("runs nothing of an answer", !(await page.evaluate(() => window.ran)) && !(await page.$(".text *")));
await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "dark" }]);
await shot("dark");
check("asks nobody but its server", hosts.size === 1, [...hosts]);
check("has no errors", errors.length === 0, errors);
await browser.close();
process.exitCode = failed ? 1 : 0;
