"""Make the golden model of this release: a small trained model in `nbs/golden/VERSION`, with what it must give back.

`08a_promises` loads every folder there. Run this once a release, after the last change to the model, and never again for
that version: later releases must read what this one wrote.
"""
import hashlib, json, shutil
from pathlib import Path
from fastcore.script import call_parse
from nbdev.config import get_config
from scld import __version__
from scld.data import toy_cells
from scld.model import SCLD

@call_parse
def main(
    overwrite:bool=False # Replace the one of this version, as long as it is not released
):
    "Make the golden model of this release"
    out = get_config().nbs_path/'golden'/__version__
    if out.exists() and not overwrite: raise SystemExit(f'{out} is there; --overwrite replaces it, as long as the version is not released')
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    m = SCLD(toy_cells(150, 30), labels='cell_type', n_latent=4, n_hidden=16, widths=(16,12), n_emb=16, T=50).train(300, device='cpu', progress=False)
    m.save(out/'model')
    x = m.sample(20, seed=1).X.toarray().astype(int)
    (out/'expect.json').write_text(json.dumps(dict(fingerprint=m.fingerprint, cells_sha256=hashlib.sha256(x.tobytes()).hexdigest(), cells=x.tolist()))+'\n', encoding='utf-8')
    print(f"{sum(f.stat().st_size for f in out.rglob('*') if f.is_file()):,} bytes, fingerprint {m.fingerprint[:16]}")
