"""Plant small faults in the library, one at a time, and see which of them the notebooks' own lessons catch.

    python mutate.py                              all notebooks that have a file under .github/mutations
    python mutate.py nbs/03_diffusion.ipynb       one of them
    python mutate.py nbs/03_diffusion.ipynb --only 3     its third fault, with the error that caught it

A notebook runs once, cell by cell. Where a cell holds a fault, the run forks: the child runs that cell with the fault and
then the cells that follow, until one fails (caught) or none is left (escaped). One child has no fault and must pass, or
nothing is known. Commands that lessons start see a copy of the package with the same fault. Needs an operating system that forks.

A file of faults has a block for each, with a blank line between: what is wrong, the old text, the new text.

    ## the posterior is wider than it is
    - return (1-abar_prev)/(1-abar)*beta
    + return (1-abar)/(1-abar_prev)*beta

The old text, of one line or several, stands once in the exported cells of the notebook.
"""
import os, re, shutil, signal, sys, tempfile, time
for k in ('OMP_NUM_THREADS','NUMBA_NUM_THREADS'): os.environ.setdefault(k, '1')   # a child has one thread of its parent's
os.environ.setdefault('NUMBA_THREADING_LAYER', 'workqueue')   # OpenMP's ends a child that forks after its use
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from fastcore.script import Param,call_parse
from fastcore.xtras import working_directory

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ROOT/'.github/mutations'
BAR = 0.95   # the share of its faults that a notebook must catch

def read_faults(path):
    "The faults in the file at `path`"
    def text(block, sign): return '\n'.join(l[2:] for l in block if l.startswith(sign))
    blocks = [b.split('\n') for b in re.split(r'\n\s*\n', Path(path).read_text().strip())]
    return [SimpleNamespace(what=b[0].removeprefix('## '), old=text(b, '- '), new=text(b, '+ ')) for b in blocks]

def place(faults, cells):
    "Give each fault the number of the cell that it changes"
    exported = [i for i,c in enumerate(cells) if any(d.startswith('export') for d in c.directives_)]
    for f in faults:
        at = [i for i in exported if f.old in cells[i].source]
        if not f.old or f.old==f.new: raise ValueError(f"{f.what!r} changes nothing")
        if len(at)!=1 or cells[at[0]].source.count(f.old)!=1:
            n = sum(cells[i].source.count(f.old) for i in at)
            raise ValueError(f"{f.what!r}: its text stands {n} times in exported cells, not once: {f.old}")
        f.cell = at[0]

def module_with(fault, folder, name):
    "A copy of the package with the fault in it, first on the path of processes to come"
    shutil.copytree(ROOT/'scld', folder/'scld')
    path = folder/'scld'/f'{name}.py'
    if path.exists(): path.write_text(path.read_text().replace(fault.old, fault.new))
    os.environ['PYTHONPATH'] = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

def child(shell, cells, start, fault, name, out, limit):
    "Run the cells from `start` with the fault, write down how that ended, and end"
    os.setpgid(0, 0)   # what a lesson starts ends with it
    said = 'escaped'
    signal.signal(signal.SIGALRM, lambda *a: os._exit(2))
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        if fault: module_with(fault, Path(tempfile.mkdtemp()), name)
        for i in range(start, len(cells)):
            source = cells[i].source
            if fault and i==start: source = source.replace(fault.old, fault.new)
            shell.run(source)
            if shell.exc:
                kind = 'broken' if fault and i==start else 'caught'
                said = f'{kind} in cell {cells[i].id}, {i-start} later: {type(shell.exc).__name__}: {str(shell.exc)[:300]}'
                break
    except BaseException as e: said = f'caught: {type(e).__name__}: {e}'
    out.write_text(said)
    os._exit(0)

def forked(shell, cells, start, fault, name, tmp, limit):
    "How a child ended; the folder of temporary files is afterwards as it was"
    kept,out = Path(f'{tmp}_kept'),Path(f'{tmp}_said')
    shutil.copytree(tmp, kept, symlinks=True)
    sys.stdout.flush()
    pid = os.fork()
    if not pid: child(shell, cells, start, fault, name, out, limit)
    _,status = os.waitpid(pid, 0)
    try: os.killpg(pid, signal.SIGKILL)
    except OSError: pass
    said = out.read_text() if out.exists() else f'caught: ran longer than {limit:.0f} s' if os.waitstatus_to_exitcode(status)==2 else 'caught: the process died'
    out.unlink(missing_ok=True)
    shutil.rmtree(tmp)
    kept.rename(tmp)
    return said

def run_notebook(path, only, limit):
    "What became of each fault of a notebook: pairs of the fault and how its child ended"
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    sys.path.insert(0, str(ROOT))
    os.environ['IN_TEST'] = '1'
    signal.signal(signal.SIGINT, signal.default_int_handler)   # ignored where this runs in the background
    if hasattr(signal, 'SIGHUP'): signal.signal(signal.SIGHUP, signal.SIG_DFL)   # ignored under nohup
    flags = set(get_config().tst_flags.split())
    def runs(c): return c.cell_type=='code' and not flags & c.directives_.keys() and 'nbdev_export(' not in c.source
    nb = NBProcessor(path, rm_directives=False).nb
    for c in nb.cells: c.directives_ = c.directives_ or {} if c.cell_type=='code' else {}
    cells = [c for c in nb.cells if runs(c)]
    name = next((v[0] for c in nb.cells if c.cell_type=='code' for k,v in c.directives_.items() if k.startswith('default_exp')), '')
    faults = read_faults(FAULTS/f'{path.stem}.txt')
    place(faults, cells)
    faults = [f for i,f in enumerate(faults, 1) if not only or i==only]
    tmp = tempfile.mkdtemp(prefix='faults_')
    os.environ['TMPDIR'] = tempfile.tempdir = tmp
    shell,found = CaptureShell(path),[]
    first = min(f.cell for f in faults)
    with working_directory(path.parent):
        for i,c in enumerate(cells):
            if i==first and not only: found.append((None, forked(shell, cells, i, None, name, tmp, limit)))
            for f in faults:
                if f.cell==i: found.append((f, forked(shell, cells, i, f, name, tmp, limit)))
            if i>=max(f.cell for f in faults): break
            shell.run(c.source)
            if shell.exc: raise RuntimeError(f'{path.name} fails without a fault, in cell {c.id}: {shell.exc}')
    shutil.rmtree(tmp, ignore_errors=True)
    return found

def timed(path, only, limit):
    "`run_notebook` in a process of its own, with its seconds and what went wrong"
    start = time.time()
    try: return run_notebook(path, only, limit),None,time.time()-start
    except Exception as e: return [],f'{type(e).__name__}: {e}',time.time()-start

def report(path, found, wrong, seconds, only):
    "Print the line of one notebook and what escaped; did it pass?"
    control = [said for f,said in found if f is None and said!='escaped']
    if control: wrong = f'fails without a fault: {control[0]}'
    faults = [(f,said) for f,said in found if f]
    caught = sum(said.startswith('caught') for _,said in faults)
    ok = not wrong and caught>=BAR*len(faults)
    print(f"{'ok' if ok else 'FAIL':4} {seconds:6.1f}s {path.stem:24} {caught:3} of {len(faults):3} caught {wrong or ''}", flush=True)
    for f,said in faults:
        if only or not said.startswith('caught'): print(f'       {said}: {f.what}: {f.new.strip().splitlines()[0] if f.new.strip() else "(left out)"}', flush=True)
    return ok,caught,len(faults)

@call_parse
def main(
    notebooks:Param('Notebooks (default: all that have faults)', str, nargs='*'),
    only:int=0, # One fault by its number, from 1
    workers:int=2, # Notebooks at once
    limit:float=600, # Seconds a child may run
):
    "Plant faults and see which the lessons catch"
    names = [Path(n).stem for n in notebooks] or sorted(p.stem for p in FAULTS.glob('*.txt'))
    paths = [ROOT/'nbs'/f'{n}.ipynb' for n in names]
    with ProcessPoolExecutor(workers, max_tasks_per_child=1) as ex:
        runs = [ex.submit(timed, p, only, limit) for p in paths]
        done = [report(p, *r.result(), only) for p,r in zip(paths, runs)]
    print(f'faults: {sum(d[1] for d in done)} of {sum(d[2] for d in done)} caught, in {len(done)} notebooks')
    sys.exit(not all(d[0] for d in done))
