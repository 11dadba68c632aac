"""Read damaged and forged files of counts in every form, each in a process of its own.

    python .github/scripts/fuzz.py 2000 --out fuzz.tsv

Every try has a number, which decides its form, its damage and where; a line is added to the file for each, and a second
call goes on after the last. Outcomes:

  refused       one of the errors that a caller can expect (ValueError, KeyError, TypeError, OSError)
  identical     read as what was written: names, shape and every count
  undetectable  read as other cells that are valid too, where no checksum covers the damaged bytes: plain text, names and
                attributes, parts of HDF5 or zarr that are stored as they are. No reader can tell a 3 that became a 2
  different     read as other cells although a checksum covers the bytes (gzip, HDF5's gzip and fletcher32), or although
                the forged structure cannot be that of a count matrix: a fault
  crashed       ended by a signal, by another error, or for want of memory: a fault
  hung          not done after 60 seconds: a fault

The process may ask for 2 GB more than it has at its start. Status 1 if there was a fault."""
import argparse,csv,gzip,io,os,resource,shutil,signal,sys,tempfile,time,warnings
from collections import Counter
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import h5py, numpy as np
from anndata import AnnData
from scipy import sparse
from scld.data import toy_cells
from scld.files import read_counts

expected = ValueError,KeyError,TypeError,OSError
codes = {0:'identical', 1:'refused', 2:'different', 3:'crashed', 4:'crashed: memory'}

# ---------------------------------------------------------------- forms

def with_(a, X, where):
    "`a` with the matrix `X` in `X`, in a layer or in `raw`"
    if where=='X': return AnnData(X, obs=a.obs, var=a.var)
    b = AnnData(a.X.log1p(), obs=a.obs, var=a.var, raw=AnnData(X, obs=a.obs, var=a.var) if where=='raw' else None)
    if where=='layer': b.layers['layer'] = X
    return b

def write_h5ad(a, d, kind, where, **kw):
    with_(a, {'csr': a.X, 'csc': a.X.tocsc(), 'dense': a.X.toarray()}[kind], where).write_h5ad(d/'a.h5ad', **kw)
    return d/'a.h5ad'

def write_zarr(a, d, kind, where):
    with_(a, {'csr': a.X, 'csc': a.X.tocsc(), 'dense': a.X.toarray()+0}[kind], where).write_zarr(d/'a.zarr')
    return d/'a.zarr'

def write_10x_h5(a, d, new, **kw):
    X,names = a.X.astype(np.int32),a.var_names.to_numpy('S')
    with h5py.File(d/'a.h5', 'w') as f:
        g = f.create_group('matrix' if new else 'hg19')
        for k,v in dict(data=X.data, indices=X.indices.astype('i8'), indptr=X.indptr.astype('i8'), barcodes=a.obs_names.to_numpy('S')).items():
            g.create_dataset(k, data=v, **kw)
        g['shape'] = np.array(X.shape[::-1])
        if not new: g['genes'],g['gene_names'] = names,names
        if new: f['matrix/features/id'],f['matrix/features/name'],f['matrix/features/feature_type'] = names,names,np.array([b'Gene Expression']*a.n_vars)
    return d/'a.h5'

def write_10x(a, d, packed, lists=True):
    M = sparse.coo_matrix(a.X.T.astype(int))
    lines = dict(matrix=['%%MatrixMarket matrix coordinate integer general',f'{a.n_vars} {a.n_obs} {M.nnz}']+[f'{i+1} {j+1} {v}' for i,j,v in zip(M.row, M.col, M.data)])
    if lists: lines |= dict(barcodes=list(a.obs_names), features=[f'E{g}\t{g}\tGene Expression' for g in a.var_names])
    (d/'a').mkdir()
    for k,v in lines.items():
        name,text = f"{k}.{'mtx' if k=='matrix' else 'tsv'}",'\n'.join([*v,'']).encode()
        (d/'a'/f'{name}.gz').write_bytes(gzip.compress(text)) if packed else (d/'a'/name).write_bytes(text)
    return d/'a'

def write_table(a, d, name):
    a.to_df().astype(int).to_csv(d/name, sep='\t' if 'tsv' in name else ',')
    return d/name

def write_loom(a, d):
    with h5py.File(d/'a.loom', 'w') as f:
        f.create_dataset('matrix', data=a.X.toarray().T, chunks=(16,16), compression='gzip')
        f['col_attrs/CellID'],f['row_attrs/Gene'] = a.obs_names.to_numpy('S'),a.var_names.to_numpy('S')
    return d/'a.loom'

forms = {f'h5ad {k} {w}{z}': (lambda a, d, k=k, w=w, z=z: write_h5ad(a, d, k, w, **(dict(compression='gzip') if z else {}))) for k in ('csr','csc') for w in ('X','layer','raw') for z in ('',' gz')}
forms |= {'h5ad dense X gz': lambda a, d: write_h5ad(a, d, 'dense', 'X', compression='gzip')}
forms |= {f'zarr {k} {w}': (lambda a, d, k=k, w=w: write_zarr(a, d, k, w)) for k,w in (('csr','X'), ('csc','X'), ('dense','X'), ('csr','layer'), ('csc','raw'))}
forms |= {f'10x h5 {2+new}{z}': (lambda a, d, new=new, z=z: write_10x_h5(a, d, new, **(dict(chunks=True, compression='gzip') if z and new else {}))) for new in (0,1) for z in ('',' gz')}
forms |= {'10x folder': lambda a, d: write_10x(a, d, False), '10x folder gz': lambda a, d: write_10x(a, d, True), 'mtx gz': lambda a, d: write_10x(a, d, True, False)}
forms |= {n: (lambda a, d, n=n: write_table(a, d, f'a.{n}')) for n in ('csv','csv.gz','tsv.gz')} | {'loom': write_loom}

def layer_of(form): return next((w for w in ('layer','raw') if w in form.split()), None)

# ---------------------------------------------------------------- damage

def mutate(data, rng):
    "Bytes with one random damage, and the place of it: first byte, byte after the last"
    data,kind = bytearray(data),rng.integers(6)
    i,j = np.sort(rng.integers(0, max(len(data), 1), 2))
    if not data or kind==0: return bytes(data[:i]),(i,len(data))
    if kind==1: data[i] ^= 1<<int(rng.integers(8)); return bytes(data),(i,i+1)
    if kind==2: data[i:i+8] = rng.bytes(len(data[i:i+8])); return bytes(data),(i,i+8)
    if kind==3: data[i:i] = data[i:i+int(rng.integers(1, 64))]; return bytes(data),(i,len(data))
    if kind==4: data[i:j] = bytes(j-i); return bytes(data),(i,j)
    k = min(64, len(data)-j)
    data[i:i+k],data[j:j+k] = data[j:j+k],data[i:i+k]
    return bytes(data),(i,j+k)

def covered(path):
    "Parts of a file that a checksum covers: pairs of first byte and byte after the last"
    if path.suffix=='.gz': return [(10,2**62)] # behind the header of gzip
    found = []
    def look(_, d):
        if not isinstance(d, h5py.Dataset) or not d.chunks or not (d.compression=='gzip' or d.fletcher32): return
        for k in range(d.id.get_num_chunks()): c = d.id.get_chunk_info(k); found.append((c.byte_offset,c.byte_offset+c.size))
    if path.suffix in ('.h5ad','.h5','.loom'):
        with h5py.File(path) as f: f.visititems(look)
    return found

def break_bytes(path, rng):
    "Damage the bytes of a file; what was done, and whether a checksum covers all of the place"
    parts = covered(path)
    data,(i,j) = mutate(path.read_bytes(), rng)
    path.write_bytes(data)
    return f'bytes {i} to {j} of {path.name}',any(a<=i and j<=b for a,b in parts)

def break_text(path, rng):
    "Damage the text in a gzipped file, which is packed anew, so that no checksum tells"
    data,(i,j) = mutate(gzip.decompress(path.read_bytes()), rng)
    path.write_bytes(gzip.compress(data))
    return f'text {i} to {j} in {path.name}',False

def forge_file(path, rng):
    "Take a file of a folder away, or put something else in its place"
    kind = ('gone','empty','pipe','link')[rng.integers(4)]
    path.unlink()
    if kind=='empty': path.touch()
    if kind=='pipe': os.mkfifo(path)
    if kind=='link': path.symlink_to('/etc/passwd')
    return f'{path.name}: {kind}',kind!='gone' or path.name[0].isdigit() or path.name=='c' # a part of a zarr array that is gone

def group_of(f, form):
    "The group or array of an open store that holds the counts"
    if '10x' in form: return f['matrix' if 'matrix' in f else 'hg19']
    return f['matrix' if 'loom' in form else {'layer':'layers/layer', 'raw':'raw/X'}.get(layer_of(form), 'X')]

def forge(path, form, rng):
    "Write values into the matrix of a store that no count matrix has"
    import zarr
    f = zarr.open(str(path), mode='r+') if 'zarr' in form else h5py.File(path, 'r+')
    g = group_of(f, form)
    name = str(rng.choice(['indices','indptr','data','shape'])) if hasattr(g, 'keys') else 'data'
    a = g if not hasattr(g, 'keys') else g[name] if name in g else None
    wrong = [-1,-5,60,300,1000,10**7,2**31-1] if name!='data' else [-1,-7]
    if name=='shape' and a is None: v = [int(rng.choice([0,1,59,10**7,2**40])) for _ in range(2)]; g.attrs['shape'] = v
    elif name=='shape': v = [int(rng.choice([0,1,59,10**7])) for _ in range(2)]; a[...] = np.array(v)
    else:
        v,x = int(rng.choice(wrong)),a[...]
        n = int(rng.choice([1,1,x.size//7]))
        at = rng.choice(x.size, max(n, 1), replace=False)
        if name=='data': x = x.reshape(-1); x[at] = v; x = x.reshape(a.shape)
        elif rng.random()<0.5: x[at] = v
        else: x[at] += np.array(v, dtype=x.dtype)
        a[...] = x
    told = name not in ('indices','indptr') or not sound(g)
    if 'zarr' not in form: f.close()
    return f'{name}: {v}',told

def sound(g):
    "Could the indices and pointers, forged or not, be those of a matrix of 60 by 60?"
    p,i = g['indptr'][...].astype(float),g['indices'][...].astype(float)
    return p[0]==0 and p[-1]==len(i) and (np.diff(p)>=0).all() and np.diff(p).max()<=120 and i.min()>=0 and i.max()<60

def damage(path, form, rng):
    "Damage the file or folder `path`; what was done, and whether it should be told"
    kind = rng.random()
    store = form.split()[0] in ('h5ad','zarr','loom') or '10x h5' in form
    if store and kind<0.4: return forge(path, form, rng)
    files = sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]
    file = files[rng.integers(len(files))]
    if path.is_dir() and kind>0.85: return forge_file(file, rng)
    if file.suffix=='.gz' and kind<0.6: return break_text(file, rng)
    return break_bytes(file, rng)

# ---------------------------------------------------------------- tries

def apart(f, seconds, more_gb=None):
    "Run `f` in a fork; its exit status, or None if it took too long; seconds; the most memory it held, in MB"
    t = time.time()
    if not (pid := os.fork()):
        try:
            if more_gb:
                held = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (held+int(more_gb*2**30),)*2)
            resource.setrlimit(resource.RLIMIT_CORE, (0,0))
            code = f() or 0
        except BaseException: code = 3
        os._exit(code)
    while True:
        done,status,usage = os.wait4(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status),time.time()-t,usage.ru_maxrss/1024
        if time.time()-t>seconds: os.kill(pid, signal.SIGKILL); os.wait4(pid, 0); return None,time.time()-t,0
        time.sleep(0.01)

def read(path, layer, want, said):
    "Read in this process; a code of `codes`, and what was said into the file `said`"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); a = read_counts(path, layer)
    except expected as e:
        said.write_text(f'{type(e).__name__}: {e}')
        return 4 if 'MemoryError' in str(e.__cause__.__class__) or 'allocate' in str(e).lower() else 1
    except MemoryError as e: said.write_text(f'MemoryError: {e}'); return 4
    except BaseException as e: said.write_text(f'{type(e).__name__}: {e}'); return 3
    same = a.shape==want.shape and (a.X!=want.X).nnz==0 and list(a.var_names)==list(want.var_names) and list(a.obs_names)==list(want.obs_names)
    if not same: said.write_text(f'{a.n_obs} × {a.n_vars}, {a.X.sum():.0f} counts')
    return 0 if same else 2

def once(i, seed, originals, want, d):
    "Try number `i`: its line for the table"
    rng = np.random.default_rng([seed,i])
    form = list(forms)[rng.integers(len(forms))]
    path,said,note = d/originals[form].name,d/'said.txt',d/'note.txt'
    for p in (path,said,note): shutil.rmtree(p, ignore_errors=True) if p.is_dir() else p.unlink(missing_ok=True)
    shutil.copytree(originals[form], path) if originals[form].is_dir() else shutil.copy(originals[form], path)
    def spoil(): what,told = damage(path, form, rng); note.write_text(f'{told:d}{what}')
    apart(spoil, 60) # in a process of its own: zarr starts threads, which a fork does not survive
    told,what = (note.read_text()[:1]=='1',note.read_text()[1:]) if note.exists() else (False,'could not be damaged')
    target = want['mtx gz' if form=='mtx gz' else '']
    code,seconds,mb = apart(lambda: read(path, layer_of(form), target, said), 60, 2)
    end = 'hung' if code is None else codes.get(code, f'crashed: signal {-code}')
    if end=='different' and not told: end = 'undetectable'
    text = ' '.join(said.read_text().replace(str(d), 'DIR').split())[:200] if said.exists() else ''
    return dict(i=i, form=form, damage=what, end=end, seconds=f'{seconds:.2f}', mb=f'{mb:.0f}', said=text)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('n', type=int, help='number of tries in all, those in the file included')
    p.add_argument('--out', type=Path, default=Path('fuzz.tsv'), help='table of outcomes; goes on with one that is there')
    p.add_argument('--seed', type=int, default=0)
    o = p.parse_args()
    done = list(csv.DictReader(o.out.open(), delimiter='\t')) if o.out.exists() else []
    a = toy_cells(60)
    plain = AnnData(a.X, obs=a.obs.reset_index(drop=True).rename(index=str), var=a.var.reset_index(drop=True).rename(index=str))
    want = {'': a, 'mtx gz': plain}
    with tempfile.TemporaryDirectory() as d, o.out.open('a') as out:
        d,originals = Path(d),{}
        for form,write in forms.items():
            at = d/form.replace(' ', '_')
            at.mkdir()
            def make(): warnings.simplefilter('ignore'); write(a, at)
            apart(make, 60)
            originals[form] = next(at.iterdir())
        (work := d/'work').mkdir()
        for form,path in originals.items(): # undamaged, all must be read
            code,_,_ = apart(lambda: read(path, layer_of(form), want['mtx gz' if form=='mtx gz' else ''], work/'said.txt'), 60, 2)
            if code: sys.exit(f"{form}, undamaged: {codes.get(code, code)} {(work/'said.txt').read_text()}")
        table = csv.DictWriter(out, ['i','form','damage','end','seconds','mb','said'], delimiter='\t')
        if not done: table.writeheader()
        for i in range(len(done), o.n):
            done.append(once(i, o.seed, originals, want, work))
            table.writerow(done[-1])
            out.flush()
    ends = Counter(r['end'] for r in done)
    print(f"{len(done)} tries: "+', '.join(f'{n} {k}' for k,n in ends.most_common()))
    print(f"longest {max(float(r['seconds']) for r in done):.1f} s, most memory {max(float(r['mb']) for r in done):.0f} MB")
    bad = [r for r in done if r['end'].split(':')[0] in ('different','crashed','hung')]
    for r in bad: print(*r.values(), sep=' | ')
    sys.exit(bool(bad))

if __name__=='__main__': main()
