"""Quick tests on the lowest and on the newest version of everything that settings.ini allows.

    python versions.py oldest      makes a fresh environment in a temporary folder, installs, tests, removes it
    python versions.py             both sets
    python versions.py --list      says what they ask for, and installs nothing

`oldest` takes of every requirement, those of the extras too, the very version behind its `>=`; pip resolves them together, or
says which two do not go together. `newest` takes whatever is newest, torch too. Needs the standard library only. `pip`'s own
settings decide where packages come from.
"""
import os, re, shlex, subprocess, sys, tempfile, time, venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICK = ('00_data','01_autoencoder','05a_model','06k_report','tutorials/quickstart')
EXTRAS = ('requirements','dist_requirements','zarr_requirements')
TOOLS = ('nbdev','execnb','ghapi','build','diffusers','hypothesis','loompy','pot','dask') # what the tests need besides

def requirements(*keys):
    "Requirements of settings.ini"
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return [r for k in keys for r in shlex.split(ini['DEFAULT'][k])]

def name(r): return re.match(r'[\w.-]+', r)[0]
def lowest(r): return f"{name(r)}=={re.search(r'>=([0-9.]+)', r)[1]}"

TESTS = [r for r in requirements('dev_requirements') if name(r) in TOOLS]
SETS = dict(oldest=[*map(lowest, requirements(*EXTRAS)), *TESTS], newest=[*requirements(*EXTRAS), *TESTS])
SAY = "import sys, importlib.metadata as m; print('python', sys.version.split()[0], *(f'{p} {m.version(p)}' for p in sys.argv[1:]), flush=True)"

def check(which):
    "Install one set and the package, and run the quick tests; the exit status"
    with tempfile.TemporaryDirectory() as d:
        venv.create(d, with_pip=True)
        path = Path(d)/('Scripts' if sys.platform=='win32' else 'bin')
        env = dict(os.environ, VIRTUAL_ENV=d, PATH=f"{path}{os.pathsep}{os.environ['PATH']}")
        def run(*a): return subprocess.run([path/'python', *a], cwd=ROOT, env=env).returncode
        start = time.time()
        if run('-m', 'pip', 'install', '-q', *SETS[which], '-e', '.') or run('-m', 'pip', 'check'): return 1
        run('-c', SAY, *map(name, requirements(*EXTRAS)))
        print(f'{which}: installed in {time.time()-start:.0f} s', flush=True)
        start,failed = time.time(),max(run('.github/scripts/nbtest.py', '--path', f'nbs/{n}.ipynb', '--workers', '1') for n in QUICK)
        print(f'{which}: tested in {time.time()-start:.0f} s', flush=True)
        return failed

if __name__=='__main__':
    names = [a for a in sys.argv[1:] if a!='--list'] or list(SETS)
    unknown = set(names)-set(SETS)
    if unknown: sys.exit(f'no set {unknown}; choose from {list(SETS)}')
    if '--list' in sys.argv:
        for n in names: print(n, *SETS[n])
        sys.exit()
    failed = [n for n in names if check(n)]
    print(f'{len(names)-len(failed)} of {len(names)} sets passed' + (f'; failed: {failed}' if failed else ''))
    sys.exit(bool(failed))
