"""Open every page of the built site in headless Chromium, as a reader does, on a wide screen and on a phone.

Fails on an error in the console, a file that does not load, mathematics that was not set, a link inside the site that leads
nowhere, a picture without a text for those who cannot see it, a link spelt out in code, and a page wider than the screen. Needs `pip install
playwright` and a Chromium on the machine; looks at the files only, without a network.
"""
import re, shutil, sys
from pathlib import Path
from fastcore.script import call_parse
from nbdev.config import get_config

FLAGS = ['--no-sandbox','--disable-gpu','--no-first-run','--disable-background-networking','--disable-component-update','--disable-sync']

LOOK = r"""() => {
  const text = document.createTreeWalker(document.querySelector('main') || document.body, NodeFilter.SHOW_TEXT), raw = [];
  for (let n; n = text.nextNode();) if (!n.parentElement.closest('pre,code,script,style,.katex') && /\$[^$\s][^$]*\$|\\\(|\\\[/.test(n.data)) raw.push(n.data.trim().slice(0, 60));
  const no_alt = [...document.images].filter(i => !(i.getAttribute('alt') || '').trim()).length;
  const coded = [...document.querySelectorAll('main pre')].filter(p => /\]\(https?:/.test(p.textContent)).length;
  const failed = document.querySelectorAll('.katex-error').length;
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const links = [...document.querySelectorAll('a[href]')].map(a => a.href).filter(h => h.startsWith('file:'));
  return {raw, no_alt, coded, failed, wide, links};
}"""

def look(page, path, width):
    "What is wrong with the page at `path`, and its links to other files"
    said = []
    on = {'console': lambda m: m.type=='error' and said.append(f'console: {m.text}'), 'pageerror': lambda e: said.append(f'error: {e}'),
          'requestfailed': lambda r: said.append(f'did not load: {r.url}')}
    for k,f in on.items(): page.on(k, f)
    page.set_viewport_size(dict(width=width, height=900))
    page.goto(path.as_uri(), wait_until='load')
    page.wait_for_timeout(250)
    got = page.evaluate(LOOK)
    for k,f in on.items(): page.remove_listener(k, f)
    said += [f'not set: {t}' for t in got['raw']]
    if got['failed']: said.append(f"{got['failed']} formulas that KaTeX cannot set")
    if got['coded']: said.append(f"{got['coded']} blocks of code with a link in them")
    if got['no_alt']: said.append(f"{got['no_alt']} pictures without alt text")
    if got['wide']>1: said.append(f"{got['wide']} pixels wider than a screen of {width}")
    return said,got['links']

def dead(page, links, root):
    "Links to a file or a place that is not there"
    res = []
    for u in sorted(set(links)):
        path,_,place = u.removeprefix('file://').partition('#')
        f = Path(re.sub('%20', ' ', path.partition('?')[0]))
        if f.is_dir(): f = f/'index.html'
        if not f.exists(): res.append(f'no file {f}')
        elif place and f.suffix=='.html' and not re.search(rf'id="{re.escape(place)}"', f.read_text(encoding='utf-8')) and place!='': res.append(f'no place #{place} in {f.name}')
    return res

def search(page, root):
    "How many pages a search from the first page finds"
    page.set_viewport_size(dict(width=1280, height=900))
    page.goto((root/'index.html').as_uri(), wait_until='load')
    box = page.locator('input[type=search], #quarto-search input').first
    box.click(); box.type('guidance')
    page.wait_for_timeout(800)
    return page.evaluate("document.querySelectorAll('[class*=search] a[href], .aa-Item, [id*=search] a[href]').length")

@call_parse
def main(
    site:str=None, # Folder of the site; `_docs` if absent
    shots:str='', # Folder for pictures of every page, 1280 and 390 pixels wide
    only:str='', # Pages whose name holds this
    chromium:str='' # The browser; found on the PATH if absent
):
    "Check the site in a browser"
    from playwright.sync_api import sync_playwright
    root = Path(site or get_config().doc_path).resolve()
    exe = chromium or next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)
    if exe is None: raise SystemExit('no Chromium on this machine')
    pages = [p for p in sorted(root.rglob('*.html')) if only in p.relative_to(root).as_posix()]
    if not pages: raise SystemExit(f'no pages in {root}; run .github/scripts/docs.py')
    if shots: Path(shots).mkdir(parents=True, exist_ok=True)
    bad = 0
    with sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=exe, args=FLAGS)
        page = browser.new_page(); page.set_default_timeout(180_000)  # a busy machine is no fault of a page
        for p in pages:
            name,said = p.relative_to(root).with_suffix('').as_posix(),[]
            for width in (1280,390):
                found,links = look(page, p, width)
                said += [f'{width}: {s}' for s in found]
                if shots: page.screenshot(path=f"{shots}/{name.replace('/', '-')}-{width}.png")
            said += dead(page, links, root)
            bad += len(said)
            print('ok  ' if not said else 'FAIL', name, *said, sep='\n     ' if said else ' ', flush=True)
        hits = search(page, root)
        if not hits: bad += 1
        browser.close()
    print(f'search for "guidance": {hits} hits')
    print(f'{len(pages)} pages, {bad} findings')
    sys.exit(bool(bad))
