"""Quick tests on the oldest and on the newest scanpy and anndata that the package promises to work with.

    python versions.py oldest      makes a fresh environment in a temporary folder, installs, tests, removes it
    python versions.py             both sets

Needs the standard library only. `pip`'s own settings decide where packages come from.
"""
import subprocess, sys, tempfile, venv
from pathlib import Path

SETS = dict(
    oldest=['scanpy==1.10.*','anndata==0.11.*','pandas<3','zarr<3','scipy<1.15'], # anndata 0.11 knows no later ones
    newest=['scanpy','anndata'])
QUICK = ('00_data','05a_model','06c_report','tutorials/quickstart')

def check(name, root):
    "Install one set beside the package and run the quick tests; the exit status"
    with tempfile.TemporaryDirectory() as d:
        venv.create(d, with_pip=True)
        py = str(Path(d)/('Scripts' if sys.platform=='win32' else 'bin')/'python')
        def run(*a, **kw): return subprocess.run([py, *a], cwd=root, **kw).returncode
        if run('-m', 'pip', 'install', '-q', '-e', '.[dev]', *SETS[name]): return 1
        run('-c', f"import anndata, numpy, scanpy, sys, torch; print('{name}: python', sys.version.split()[0], *(f'{{m.__name__}} {{m.__version__}}' for m in (scanpy,anndata,numpy,torch)), flush=True)")
        return max(run('.github/scripts/nbtest.py', '--path', f'nbs/{n}.ipynb', '--workers', '1') for n in QUICK)

if __name__=='__main__':
    root,names = Path(__file__).resolve().parents[2],sys.argv[1:] or list(SETS)
    unknown = set(names)-set(SETS)
    if unknown: sys.exit(f'no set {unknown}; choose from {list(SETS)}')
    failed = [n for n in names if check(n, root)]
    print(f'{len(names)-len(failed)} of {len(names)} sets passed' + (f'; failed: {failed}' if failed else ''))
    sys.exit(bool(failed))
