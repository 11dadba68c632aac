"""Pages on a machine that has a GPU but neither nbdev nor Jupyter: every code cell, failures listed and passed over

    python card_pages.py 00d_training,05a_model          each page in a process of its own, for at most $LIMIT seconds
"""
import builtins,json,os,subprocess,sys,time,traceback
from pathlib import Path
from types import ModuleType

def without_jupyter():
    "Stand-ins for what pages import of Jupyter"
    top,show = ModuleType('IPython'),ModuleType('IPython.display')
    for name in ('display','Markdown','HTML','Image','SVG'): setattr(show, name, lambda *a, **k: None)
    top.display,top.version_info,top.get_ipython = show,(9,0),lambda: None
    sys.modules.update({'IPython': top, 'IPython.display': show})
    builtins.display,builtins.show_doc = show.display,show.display
    os.environ['MPLBACKEND'] = 'agg'

def sources(page):
    "Code cells that are to run: number and text"
    for c in json.loads(Path(f'nbs/{page}.ipynb').read_text())['cells']:
        lines = [l for l in ''.join(c['source']).splitlines() if 'import nbdev' not in l and 'nbdev.showdoc' not in l]
        text = '\n'.join(lines)
        if c['cell_type']=='code' and '#| slow' not in text and not text.startswith('%'): yield c.get('id'),text

def run(page):
    "Run a page, and say which cells failed"
    without_jupyter()
    cells,scope,start,bad = list(sources(page)),{'__name__': '__main__'},time.time(),[]
    os.chdir((Path('nbs')/page).parent)
    for i,text in cells:
        try: exec(compile(text, f'{page}:{i}', 'exec'), scope)
        except BaseException as e: bad.append(f'--- {page} {i}\n'+''.join(traceback.format_exception(e))[-1500:])
    print(f'=== {page}: {len(cells)} cells, {len(bad)} failed, {time.time()-start:.0f} s', *bad, sep='\n', flush=True)

def main(pages):
    "All pages at once"
    out = Path(os.environ.get('OUT', '.'))
    def begin(p):
        with open(out/f'page_{p.replace("/", "_")}.log', 'w') as f:
            return subprocess.Popen([sys.executable,__file__,'--one',p], stdout=f, stderr=subprocess.STDOUT)
    begun,end = [begin(p) for p in pages],time.time()+float(os.environ.get('LIMIT', 150))
    while any(p.poll() is None for p in begun) and time.time()<end: time.sleep(0.5)
    for p in begun: p.kill()

if __name__=='__main__': run(sys.argv[2]) if sys.argv[1]=='--one' else main(sys.argv[1].split(','))
