"""Run notebooks under a real Jupyter kernel, each from its own folder, as a reader in JupyterLab would; list the seconds.

Every cell runs but those that carry a flag of `tst_flags` (such as `slow`) and the export at the end. Outputs are not kept.
Needs `pip install nbclient ipykernel`.
"""
import os, sys, time
for k in ('OMP_NUM_THREADS','NUMBA_NUM_THREADS'): os.environ.setdefault(k, '1')  # as in nbtest.py
from pathlib import Path
import nbformat
from fastcore.script import call_parse
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.config import get_config
from nbdev.doclinks import nbglob

def left_out(cell, flags):
    "Is this a cell that the tests leave out, or the export?"
    marks = {l.replace('#|','').strip().split(':')[0] for l in cell.source.splitlines() if l.startswith('#|')}
    return cell.cell_type=='code' and ('nbdev_export(' in cell.source or bool(marks & flags))

@call_parse
def main(
    path:str=None, # A notebook, or a folder of them; all if absent
    timeout:int=900 # Seconds a cell may take
):
    "Run notebooks under a Jupyter kernel"
    cfg = get_config(); flags,failed = set(cfg.tst_flags.split()),[]
    files = sorted(Path(f).absolute() for f in nbglob(path, as_path=True))
    for f in files:
        nb,t,said = nbformat.read(f, 4),time.time(),''
        nb.cells = [c for c in nb.cells if not left_out(c, flags)]
        try: NotebookClient(nb, timeout=timeout, kernel_name='python3', resources=dict(metadata=dict(path=str(f.parent)))).execute()
        except (CellExecutionError,TimeoutError) as e: failed.append(f); said = '\n'+str(e)[-1500:]
        print(f"{'FAIL' if said else 'ok  '} {time.time()-t:6.1f}s {f.relative_to(cfg.config_path)}{said}", flush=True)
    print(f'notebooks: {len(files)-len(failed)} ran, {len(failed)} failed')
    sys.exit(bool(failed) or not files)
