"""One run on a borrowed GPU: the paper's model by readings, GANs and kin at published widths, judged as they come.

    python card.py prepare --out FOLDER                   cells, the package and this script, ready to be carried
    python card.py make --cells FOLDER --out OUT --device cuda --deadline 500
    python card.py make ... --smoke                       the same plan, sixty steps of each training
    python card.py judge --cells FOLDER --out OUT --rows nbs/results/card2     keeps rows, judges what was not judged
    python card.py home --cells FOLDER --only neurons10k,raw,128 --rows …   one model in principal components, here

`make` runs many trainings at once in one process: each is a generator that queues some steps on a stream of its own and
yields. A step is part of a CUDA graph that holds several (five or ten), so launches are few; models of one shape are
trained as one stack, in as many kernels as one of them. Of each set of cells the device makes 50 components, worker
processes judge these, and they come back as half floats. On a CPU the same code runs without streams and graphs.
Calls before a graph is made are steps as well, and counts of steps are rounded up to whole graphs.
Needs numpy, scipy, scikit-learn, torch, fastcore and anndata; no scanpy.
"""
import argparse, gc, hashlib, heapq, json, os, platform, shutil, tempfile, threading, time, traceback, warnings
from collections import deque
from contextlib import nullcontext
from functools import lru_cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
for lib in ('OMP','OPENBLAS','MKL'): os.environ.setdefault(f'{lib}_NUM_THREADS', '1')
os.environ.setdefault('LOKY_MAX_CPU_COUNT', '1')
os.environ.setdefault('CUDA_DEVICE_MAX_CONNECTIONS', '32')
import numpy as np, torch, torch.nn.functional as F
from scipy import sparse
from torch import nn
from scld.adversarial import Critic, Generator, gradient_penalty
from scld.autoencoder import latent_kl
from scld.diffusion import NoiseSchedule, linear_betas
from scld.latent import IntroVAE, LatentAE, SkipMLP, baselines, margin_loss
from scld.metrics import mmd2_sides, pool_pcs, rf_auc, sides
from scld.post_guidance import Scorer, candidates, keep_best
from scld.pre_guidance import Denoiser, cluster_means, global_slot
from scld.unet import Attend, Conv, UNet, entries

SETS = 'zheng17_sorted','neurons10k'
TOTAL,T = 20_000,1000 # Sum of a scaled cell, steps of the chain
MODULES = ('adversarial','autoencoder','baselines','diffusion','latent','metrics','post_guidance','pre_guidance',
    'unet')
PACK,PACKS = 15_800_000,4 # Bytes of a file of arrays, and how many such files at most

# ---------------------------------------------------------------- cells

def prepare(a):
    "Write what the run needs into a folder: cells, package, script"
    from scld.runs import prepare as write_cells
    import scld
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    for d in SETS: write_cells(d, 'laptop', out/f'{d}.npz')
    shutil.copytree(Path(scld.__file__).parent, out/'scld',
        dirs_exist_ok=True, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(__file__, out/'card.py')

def read_cells(folder, name, n_genes=0):
    "Counts of training and test cells, labels, and the hash of the experiment; only some genes for a rehearsal"
    from scld.runs import LABELS, cells_sha, prepared
    train,test = prepared(Path(folder)/f'{name}.npz')
    label,genes = train.obs[LABELS].cat,train.var_names.to_numpy()
    some = np.sort(np.argsort(-train.X.sum(0).A1)[:n_genes or None])
    return SimpleNamespace(name=name, train=train.X[:,some], test=test.X[:,some], label=label.codes.to_numpy(np.int64),
        kinds=list(label.categories), genes=genes[some], sha=cells_sha(train, test))

def scaled(X):
    "Counts scaled to a sum of 20,000, without logarithm"
    return sparse.diags(TOTAL/X.sum(1).A1)@X

def dealt(label, n, rng):
    "Labels of `n` cells, as common as among the training cells, in random order"
    size = np.bincount(label)
    many = np.diff(np.floor(n*size.cumsum()/size.sum()+rng.random()).astype(int), prepend=0)
    return rng.permutation(np.repeat(np.arange(len(size)), many))

# ---------------------------------------------------------------- judging

CELLS = {} # Set by `make` and `judge` before the workers start
VIEWS = 'raw','log'

def views(native, scale):
    "Values of a system as scaled values and as their logarithm; `scale` says what they are"
    raw = np.expm1(native) if scale=='log' else native
    return dict(raw=raw, log=native if scale=='log' else np.log1p(raw))

def judge_values(native, scale, data, trees, seed=0):
    "Forest and MMD² on 50 components of the pool, for scaled and for logged values, all on a CPU"
    out,test = dict(see='pcs', trees=trees, n=int(native.shape[0])),scaled(CELLS[data].test)
    for name,y in views(native, scale).items():
        out |= judge_pcs(pool_pcs(test.log1p() if name=='log' else test, y), test.shape[0], name, trees, seed)
    return out

def judge_pcs(z, n_test, view, trees, seed=0):
    "Forest and MMD² of the components of one view; test cells come first"
    z = z.astype(np.float64)
    auc = rf_auc(z[:n_test], z[n_test:], 'genes-5fold', trees, seed)
    d2 = 1e3*float(mmd2_sides(z, sides(n_test, len(z)-n_test))[0])
    return {f'mmd2_e3_{view}': d2, f'auc_{view}': float(auc.mean()), f'auc_{view}_sd': float(auc.std())}

def judge_job(z, n_test, view, trees):
    "`judge_pcs` in a worker, and how long it took"
    warnings.simplefilter('ignore')
    t = time.time()
    try: found = judge_pcs(z, n_test, view, trees)
    except Exception: return traceback.format_exc(),time.time()-t
    return dict(see='pcs', trees=trees, n=len(z)-n_test, **found),time.time()-t

def squares(x):
    "The smaller of both products of a matrix with itself"
    return x@x.T if len(x)<x.shape[1] else x.T@x

@lru_cache
def start(n, p, device):
    "Where subspace iteration starts, always the same"
    return torch.randn(n, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)

def widest(K, k=50, more=150, rounds=10):
    "The k widest eigenvectors of a symmetric matrix, widest first, and their eigenvalues, by subspace iteration"
    q = start(len(K), min(k+more, len(K)), K.device)
    for _ in range(rounds):
        q = K@(K@torch.linalg.qr(q)[0])
        yield
    q = torch.linalg.qr(q)[0]
    small = q.T@(K@q)
    yield 'drain'
    lam,w = np.linalg.eigh(small.cpu().numpy()) # Small, on the host: nothing waits for the device
    return torch.from_numpy(lam[-k:][::-1].copy()).clamp(min=0).to(K),q@torch.from_numpy(w[:,-k:][:,::-1].copy()).to(K)

def principal_scores(x, k=50):
    "As `scld.metrics.pool_pcs` up to sign, on any device, by `yield from`"
    x = x.double()-x.double().mean(0)
    lam,v = yield from widest(squares(x), k)
    return v*lam.sqrt() if len(x)<x.shape[1] else x@v

def at_once(job):
    "What a generator returns"
    while True:
        try: next(job)
        except StopIteration as e: return e.value

def packed(z):
    "Components as half floats; a power of two keeps them in range, to which forest and MMD² are blind"
    top = np.abs(z).max()
    return (z*2.**(12-np.ceil(np.log2(top)))).astype(np.float16) if top>0 else z.astype(np.float16)

LADDER = dict(positive=('Positive',{}), random=('Random',{}), splatter=('Splatter',dict(match=False)),
    splatter_match=('Splatter',{}), sugar=('SUGAR',dict(counts=None)), sugar_t0=('SUGAR',dict(counts=None, t=0)))

def ladder(data, row, seed, path, n):
    "Cells of a system that needs no GPU, written to a file; how long it took"
    from anndata import AnnData
    import pandas as pd
    t,c = time.time(),CELLS[data]
    name,own = LADDER[row]
    obs = pd.DataFrame(dict(cell_type=pd.Categorical.from_codes(c.label, c.kinds)),
        index=[f'c{i}' for i in range(len(c.label))])
    a = AnnData(c.train, obs=obs, var=pd.DataFrame(index=c.genes))
    made = baselines[name](**own).fit(a, labels='cell_type', seed=seed).sample(n, seed=seed).X
    values = made if 'counts' in own else scaled(made)
    np.save(path, values.toarray().astype(np.float32))
    return time.time()-t

# ---------------------------------------------------------------- what a run shares

class Context:
    "Data on the device, the clock, the workers, and the files that come back"
    def __init__(self, a, pool):
        self.a,self.dev,self.out,self.t0,self.n = a,torch.device(a.device),Path(a.out),time.time(),a.made
        self.stop,self.hard,self.end = self.t0+a.deadline-a.tail,self.t0+a.deadline-0.4*a.tail,self.t0+a.deadline
        self.pool,self.running,self.order,self.shared,self.packs = pool,[],count(),{},[{}]
        self.pools,self.waiting,self.sets,self.judged,self.here = [],[],{},set(),None
        self.pack_bytes,self.dirty,self.sample_steps,self.kept = [0],False,a.chain,set()
        self.tmp = Path(tempfile.mkdtemp())
        self.rows = open(self.out/'rows.jsonl', 'a')
        self.x,self.test,self.label,self.means = {},{},{},{}
        for d,c in CELLS.items():
            self.x[d],self.test[d] = ({'raw': v, 'log': v.log1p()} for v in map(self.dense, (c.train,c.test)))
            self.label[d] = torch.from_numpy(c.label).to(self.dev)
    def dense(self, x): return torch.from_numpy(scaled(x).toarray()).float().to(self.dev)
    def over(self): return time.time()>self.stop-(self.here.early if self.here else 0)
    def say(self, *what): print(f'[{time.time()-self.t0:6.1f}]', *what, flush=True)
    def row(self, **kw): self.rows.write(json.dumps(kw)+'\n'); self.rows.flush()

    def emit(self, name, native, scale, data, rank, **meta):
        "Hand cells to the judges: components first, of their own scale before the other"
        self.row(name=name, made=True, data=data, scale=scale, at=round(time.time()-self.t0, 1), **meta)
        event = torch.cuda.Event() if self.dev.type=='cuda' else None
        if event: event.record()
        rank = rank+1 if rank==0 and meta.get('seed') else rank # Ends 0, of later seeds 1, on the way 2
        self.sets[name] = SimpleNamespace(native=native.detach().float(), scale=scale, data=data, rank=rank,
            event=event, pcs={}, n_test=len(self.test[data]['raw']))
        for v in VIEWS: heapq.heappush(self.pools, (rank+5*(v!=scale),next(self.order),name,v))

    def has_pcs(self, name, view, z, facts):
        "Components of one view of one set are there: queue its judges, keep those of ends"
        s = self.sets[name]
        s.pcs[view],own = packed(z),view==s.scale
        if len(s.pcs)==len(VIEWS): s.native = None
        if facts: self.row(name=name, facts=facts)
        if own and s.rank<2: self.keep(name, view)
        more = [(10+s.rank,self.a.more)] if own and self.a.more and s.rank<2 else []
        for rank,trees in [(s.rank+5*(not own),self.a.trees),*more]:
            heapq.heappush(self.waiting, (rank,next(self.order),name,(s.pcs[view],s.n_test,view,trees)))

    def keep(self, name, view):
        "Put components into a file that comes back, as long as there is room; was there any?"
        array = self.sets[name].pcs[view]
        if self.pack_bytes[-1]+array.nbytes+400>PACK:
            if len(self.packs)==PACKS: return False
            self.flush()
            self.packs.append({})
            self.pack_bytes.append(0)
        self.packs[-1][f'{name}/pcs_{view}'],self.dirty = array,True
        self.pack_bytes[-1] += array.nbytes+400
        self.kept.add((name,view))
        return True

    def keep_rest(self):
        "At the end: what was not judged, own scale first, then the other scale of ends"
        todo = [(s.rank+10*((k,v) in self.judged)+5*(v!=s.scale),k,v) for k,s in self.sets.items() for v in s.pcs]
        for rank,name,view in sorted(todo):
            if (name,view) not in self.kept and not self.keep(name, view): break

    def flush(self):
        "Write the file of arrays that is being filled"
        if not self.dirty: return
        part = self.out/f'pack{len(self.packs)-1}.part'
        with open(part, 'wb') as f: np.savez(f, **self.packs[-1])
        part.replace(part.with_suffix('.npz'))
        self.dirty = False

    def serve(self):
        "Start judges that wait, collect those that are done"
        for r in [r for r in self.running if r[1].ready()]:
            self.running.remove(r)
            self.done(*r)
        late = time.time()>self.end-90
        while self.waiting and len(self.running)<self.a.workers:
            if self.waiting[0][0]>=10 and (late or 2*len(self.running)>=self.a.workers): break # Many trees take long
            rank,_,name,args = heapq.heappop(self.waiting)
            self.running.append((name,self.pool.apply_async(judge_job, args),args[2]))

    def done(self, name, result, view):
        "Keep the figures of one set of cells"
        try: figures,seconds = result.get()
        except Exception: figures,seconds = traceback.format_exc(),0
        if isinstance(figures, str): self.say(name, view, 'NOT JUDGED', figures[-300:]); return
        self.judged.add((name,view))
        self.row(name=name, judged=figures, judge_seconds=round(seconds, 1))
        if figures['trees']>self.a.trees or view!=self.sets[name].scale: return
        short_ = [f'{k} {v:.3f}' for k,v in figures.items() if k[:4] in ('auc_','mmd2')]
        self.say(name, *short_, f'({seconds:.0f} s)')

def pooled(ctx, name, view):
    "Components of one view of one set, and some facts about its values"
    s = ctx.sets[name]
    if s.event: torch.cuda.current_stream().wait_event(s.event)
    own,x = view==s.scale,ctx.test[s.data][view]
    made = s.native if own else s.native.log1p() if view=='log' else s.native.expm1()
    if own:
        never,var,raw = made.max(0).values<=0,x.var(0),made.expm1() if view=='log' else made
        facts = torch.stack([never.sum(),(var*never).sum()/var.sum(),(x.sum(0)*never).sum()/x.sum(),
            (made==0).float().mean(),(x==0).float().mean(),raw.sum(1).mean()])
    z = yield from principal_scores(torch.cat([x,made]))
    yield 'drain'
    keys = 'silent','silent_variance','silent_sum','zeros_made','zeros_real','total'
    z,facts = z.cpu().numpy(),dict(zip(keys, facts.tolist()))|dict(genes=x.shape[1]) if own else {}
    if not np.isfinite(z).all(): raise ValueError('values that are not finite')
    ctx.has_pcs(name, view, z, facts)

def components(ctx):
    "Components of set after set, ends first, for as long as the run goes on"
    while True:
        if not ctx.pools: yield 'wait'; continue
        *_,name,view = heapq.heappop(ctx.pools)
        try: yield from pooled(ctx, name, view)
        except Exception:
            ctx.say('NO COMPONENTS', name, view, traceback.format_exc()[-300:])
            ctx.row(name=name, no_components=view)

# ---------------------------------------------------------------- steps on the device

class Repeat:
    "A function without arguments, to be called many times; where there is a GPU, a graph that holds `unroll` calls"
    def __init__(self, f, gen, unroll=1, done=0):
        self.f,self.graph,self.unroll,warm = f,None,unroll,unroll*-(-3//unroll) # Whole graphs, at least three calls
        for _ in range(warm): f()
        self.done = done+warm # Calls before the graph are steps like others
        if gen.device.type=='cpu': return
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(gen)
        graph.capture_begin(capture_error_mode='thread_local')
        try:
            for _ in range(unroll): f()
        finally: graph.capture_end()
        self.graph = graph
    def __call__(self, n):
        "At least `n` calls, in whole graphs"
        n = -(-n//self.unroll)
        for _ in range(n if self.graph else n*self.unroll): self.graph.replay() if self.graph else self.f()
        self.done += n*self.unroll

class Drop(nn.Module):
    "Dropout that draws from a generator of its own"
    def __init__(self, p, gen): super().__init__(); self.p,self.gen = p,gen
    def forward(self, x):
        if not self.training: return x
        return x*torch.empty_like(x).bernoulli_(1-self.p, generator=self.gen).div_(1-self.p)

def own_dropout(net, gen):
    "Replace dropout layers in place"
    for m in net.modules():
        for k,child in list(m.named_children()):
            if isinstance(child, nn.Dropout): setattr(m, k, Drop(child.p, gen))
    return net

def by_products(self, h):
    "`scld.unet.Conv` as one matrix product over three neighbours: the same function of the same weights"
    p = F.pad(h, (0,0,1,1))
    return F.linear(torch.cat([p[:,:-2],p[:,1:-1],p[:,2:]], -1), self.weight.permute(0, 2, 1).flatten(1), self.bias)

def by_softmax(self, u, tokens):
    "`scld.unet.Attend` written out: the same function of the same weights, for stacks"
    def heads(x): return x.unflatten(-1, (self.n_heads,-1)).transpose(1, 2)
    q,k,v = heads(self.query(u)),heads(self.key(tokens)),heads(self.value(tokens))
    share = (q@k.mT*q.shape[-1]**-0.5).softmax(-1)
    return self.out((share@v).transpose(1, 2).flatten(2))

def faster_convolution(ctx):
    "Time both forms once, forwards and backwards, and keep the faster one"
    conv,h = Conv(448, 256).to(ctx.dev),torch.randn(128, 128, 448, device=ctx.dev, requires_grad=True)
    def seconds(f):
        for i in range(25):
            if i==5: torch.cuda.synchronize(); t = time.time()
            torch.autograd.grad(f(conv, h).square().mean(), [h,*conv.parameters()])
        torch.cuda.synchronize()
        return (time.time()-t)/20
    library,products = seconds(Conv.forward),seconds(by_products)
    ctx.say(f'convolution: {1e3*library:.2f} ms as it is, {1e3*products:.2f} ms as a product')
    if products<library: Conv.forward = by_products

def generator(ctx, *key):
    "A stream of random numbers of its own"
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], 'big')
    torch.manual_seed(seed)
    return torch.Generator(ctx.dev).manual_seed(seed)

def optimiser(kind, net, lr, **kw):
    "An optimiser whose step and rate live on the device"
    params = list(net.parameters()) if isinstance(net, nn.Module) else list(net)
    cuda = params[0].is_cuda
    return params,kind(params, lr=torch.tensor(lr, device=params[0].device) if cuda else lr,
        fused=True, **(dict(capturable=True) if cuda else {}), **kw)

def downhill(params, opt, loss):
    "One step; only `params` move"
    for p,g in zip(params, torch.autograd.grad(loss, params)): p.grad = as_laid(p, g)
    opt.step()

def as_laid(p, g):
    "A gradient laid out like its parameter, which fused optimisers take for granted"
    return g if g.stride()==p.stride() else torch.empty_like(p).copy_(g)

def fall(opt, factor):
    "Multiply the learning rate, on the device"
    for g in opt.param_groups:
        if torch.is_tensor(g['lr']): g['lr'].mul_(factor)
        else: g['lr'] *= factor

def steps(ctx, repeat, goal, chunk):
    "Queue calls, `chunk` at a time, until there were `goal` or training has to stop; returns how many there were"
    while repeat.done<goal and not ctx.over():
        repeat(min(chunk, goal-repeat.done))
        if ctx.here: ctx.here.count,ctx.here.goal = repeat.done,goal
        yield
    yield 'drain'
    return repeat.done

def randint(n, size, gen):
    return torch.randint(n, (size,) if isinstance(size, int) else size, generator=gen, device=gen.device)
def randn(*shape, gen): return torch.randn(*shape, generator=gen, device=gen.device)

class Stack:
    "Networks of one shape as one: a call runs each on its own batch, in as many kernels as one of them alone"
    def __init__(self, nets, state=None):
        self.base,self.n = nets[0],len(nets)
        self.p,self.b = state or (torch.func.stack_module_state(nets) if self.n>1 else ({},{}))
        for k,v in self.p.items(): # Weights lie as their gradients will, which spares a copy a step
            if v.ndim==3 and v.requires_grad: self.p[k] = v.detach().mT.contiguous().mT.requires_grad_()
        self.params = list(self.p.values() if self.n>1 else self.base.parameters())
    def __call__(self, *args):
        "Answers, shape (n, …), to arguments of shape (n, …)"
        if self.n==1: return self.base(*(v[0] for v in args))[None]
        def one(p, b, *args): return torch.func.functional_call(self.base, (p,b), args)
        return torch.func.vmap(one, randomness='different')(self.p, self.b, *args)
    def some(self, rows):
        "A stack of some of them, for use only"
        if self.n==1 or list(rows)==list(range(self.n)): return self
        if len(rows)==1: return Stack([self.alone(rows[0])])
        state = tuple({k: v.detach()[rows].clone() for k,v in d.items()} for d in (self.p,self.b))
        return Stack([self.base]*len(rows), state)
    def alone(self, i):
        "One of them as a module; the stack is not to be trained after this"
        if self.n>1: self.base.load_state_dict({k: v.detach()[i] for k,v in self.p.items()}, strict=False)
        return self.base

# ---------------------------------------------------------------- the paper's model

class TwoLayers(nn.Module):
    "Two linear layers each way, an activation behind the first and behind the decoder's last; equations (3) to (6)"
    def __init__(self, n_genes, n_latent, mean):
        super().__init__()
        h = max(256, 2*n_latent)
        self.encoder = nn.Sequential(nn.Linear(n_genes, h), nn.ReLU(), nn.Linear(h, n_latent))
        self.decoder = nn.Sequential(nn.Linear(n_latent, h), nn.ReLU(), nn.Linear(h, n_genes), nn.ReLU())
        with torch.no_grad():
            self.decoder[2].weight.mul_(0.1)
            self.decoder[2].bias.copy_(mean)
    def forward(self, x): return self.decoder(self.encoder(x))

def autoencoders(ctx, data, scale, seeds, oracles=(2000,), n_latent=128):
    "Train autoencoders of several seeds at once; they are kept for the jobs that ask for them"
    x,t,S = ctx.x[data][scale],time.time(),len(seeds)
    unit = x.square().mean().sqrt()
    nets = []
    for s in seeds:
        gen = generator(ctx, 'ae', data, scale, n_latent, s)
        nets.append(TwoLayers(x.shape[1], n_latent, (x.mean(0)/unit).cpu()).to(ctx.dev))
    gen,net,n = generator(ctx, 'aes', data, scale, n_latent, seeds),Stack(nets),ctx.a.ae_steps
    params,opt = optimiser(torch.optim.AdamW, net.params, 1e-3)
    def step():
        b = x[randint(len(x), (S,256), gen)]/unit
        downhill(params, opt, (net(b)-b).square().mean((1,2)).sum())
        fall(opt, 0.01**(1/n))
    repeat = Repeat(step, gen, 10)
    for goal in (*(o for o in oracles if o<n), n):
        done = yield from steps(ctx, repeat, goal, 30)
        for k,s in enumerate(seeds):
            if s and goal<n and not ctx.over(): continue
            r2,back = rebuilt(net.some([k]), x, unit, s, ctx.n)
            meta = dict(system='autoencoder alone', n_latent=n_latent, seed=s, steps=done, r2=r2)
            ctx.emit(f'{data}-ae-{scale}-{n_latent}-{s}-{done}', back, scale, data, 0 if goal==n else 2, **meta,
                seconds=round(time.time()-t, 1))
        if ctx.over(): break
    ctx.say(f'{data}-ae-{scale}', f'{done} steps of {S} seeds, {1e3*(time.time()-t)/done:.2f} ms a step, r2 {r2:.3f}')
    del repeat
    for k,s in enumerate(seeds): share_autoencoder(ctx, net, k, x, unit, (data,scale,'ae',s))
    if ctx.dev.type=='cuda': torch.cuda.current_stream().synchronize() # Other streams will use them

def rebuilt(ae, x, unit, seed, n):
    "Variance explained of some training cells, and these cells after the autoencoder"
    with torch.no_grad():
        rows = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(x))[:n])).to(x.device)
        back = ae(x[rows][None]/unit)[0]*unit
        return 1-((back-x[rows])**2).sum().item()/((x[rows]-x.mean(0))**2).sum().item(),back

def share_autoencoder(ctx, net, k, x, unit, key):
    "Standardised latents of the training cells, and the way back, for other lanes"
    with torch.no_grad():
        own = TwoLayers(x.shape[1], net.base.encoder[2].out_features, torch.zeros(x.shape[1])).to(x.device)
        own.load_state_dict(net.base.state_dict() if net.n==1 else {n: v.detach()[k] for n,v in net.p.items()})
        z = torch.cat([own.encoder(b/unit) for b in x.split(1000)])
        off = sum(((own.decoder(c)*unit-b)**2).sum() for b,c in zip(x.split(1000), z.split(1000)))
        r2 = 1-off/((x-x.mean(0))**2).sum()
    mean,std = z.mean(0),z.std(0)+1e-6
    back = lambda z: own.decoder(z*std+mean)*unit
    ctx.shared[key] = SimpleNamespace(back=back, z=(z-mean)/std, r2=r2.item())

def linear_autoencoder(ctx, data, scale, k=128):
    "The best linear autoencoder in the place of a trained one: principal components, values below zero set to zero"
    x = ctx.x[data][scale]
    mean = x.mean(0)
    c = (x-mean).double()
    lam,v = yield from widest(squares(c), k)
    axes = (v if len(c)>=c.shape[1] else c.T@v/lam.sqrt()).float()
    z = (x-mean)@axes
    std = z.std(0)+1e-6
    r2 = (z.square().sum()/(x-mean).square().sum()).item()
    ctx.shared[data,scale,'linear',None] = SimpleNamespace(
        back=lambda z: ((z*std)@axes.T+mean).relu(), z=z/std, r2=r2)
    ctx.say(data, scale, f'{k} principal components, r2 {r2:.3f}')
    if ctx.dev.type=='cuda': torch.cuda.current_stream().synchronize()

def shared_autoencoder(ctx, *key):
    "The autoencoder of a reading, trained by another lane while this one waits"
    while key not in ctx.shared and time.time()<ctx.hard: yield 'wait'
    if key not in ctx.shared: raise RuntimeError(f'no autoencoder for {key}')
    return ctx.shared[key]

def schedule(ctx):
    "The tables that training and sampling need, on the device"
    s = NoiseSchedule(linear_betas(T))
    tables = dict(signal=s.alphas_cumprod.sqrt(), spread=(1-s.alphas_cumprod).sqrt(),
        pull=s.betas/(1-s.alphas_cumprod).sqrt(), grow=s.alphas.rsqrt(),
                  posterior=((1-s.alphas_cumprod_prev)/(1-s.alphas_cumprod)*s.betas).sqrt())
    return SimpleNamespace(**{k: v.float().to(ctx.dev) for k,v in tables.items()})

class Chain:
    "Ancestral sampling, Algorithm 2, with its state on the device; latents of shape (…, n_latent)"
    def __init__(self, ctx, model, shape, gen):
        self.ctx,self.gen,self.s = ctx,gen,schedule(ctx)
        self.z,self.t = torch.zeros(shape, device=ctx.dev),torch.full((1,), T-1, device=ctx.dev)
        self.label = torch.zeros(shape[:-1], dtype=torch.long, device=ctx.dev)
        def step():
            with torch.no_grad():
                eps = model(self.z, self.t.expand(shape[:-1]), self.label)
                mean = (self.z-self.s.pull[self.t]*eps)*self.s.grow[self.t]
                self.z.copy_(mean+self.s.posterior[self.t]*randn(*shape, gen=gen))
                self.t.sub_(1)
        self.repeat = Repeat(step, gen, 10 if ctx.sample_steps%10==0 else 1)
    def run(self, label, chunk=50):
        "Latents for labels, by `yield from`"
        self.label.copy_(torch.from_numpy(np.asarray(label)))
        self.z.copy_(randn(*self.z.shape, gen=self.gen))
        self.t.fill_(T-1)
        for i in range(0, self.ctx.sample_steps, chunk):
            self.repeat(min(chunk, self.ctx.sample_steps-i))
            yield
        yield 'drain'
        return self.z.clone()

class Plain(nn.Module):
    "A U-Net that hears no label"
    def __init__(self, unet): super().__init__(); self.unet = unet
    def forward(self, zt, t, label): return self.unet(zt, t)

FILM = dict(film='add', filmcat='cat', filmattention='attention')

def network(ctx, data, scale, n_latent, how, K):
    "One untrained noise predictor"
    def unet(n=n_latent, fusion='add'):
        return UNet(n, tuple(ctx.a.widths), 128, 0.1, 'conv' if how=='conv' else 'mlp', fusion, bends=0)
    if how=='plain': return Plain(unet())
    if (data,scale) not in ctx.means:
        x = scaled(CELLS[data].train)
        ctx.means[data,scale] = cluster_means(x.log1p() if scale=='log' else x, CELLS[data].label, K, 1)
    means = ctx.means[data,scale]
    return Denoiser(unet(fusion=how if how in entries else FILM.get(how, 'add')), means, 'mean')

def weights(net): return sum(p.numel() for p in net.parameters())

def named(data, how, m, n_latent):
    "Name of one model; the kind of its latents or of its fusion stands where the backbone stood"
    kind = dict(linear='linear', fixed=f'fusion_{how}').get(m[1], 'conv' if how=='conv' else 'mlp')
    return f'{data}-{m[0]}-{n_latent}-{kind}-{"plain" if how=="plain" else "pre"}-{m[2]}'

def stack(ctx, data, how, members, n_latent=128):
    "The paper's diffusion for several models at once: constant rate, batches of 128, no average, the whole chain"
    key = {'ae': lambda m: ('ae',m[2]), 'linear': lambda m: ('linear',None), 'fixed': lambda m: ('ae',0)}
    aes,nets,K = [],[],len(CELLS[data].kinds)
    for m in members: aes.append((yield from shared_autoencoder(ctx, data, m[0], *key[m[1]](m))))
    for m in members:
        gen = generator(ctx, 'paper', data, how, m)
        nets.append(network(ctx, data, m[0], n_latent, how, K).to(ctx.dev))
    gen,s,label = generator(ctx, 'stack', data, how, members),schedule(ctx),ctx.label[data]
    for net in nets: own_dropout(net, gen)
    size,net,S,t = weights(nets[0]),Stack(nets),len(members),time.time()
    params,opt = optimiser(torch.optim.AdamW, net.params, 1e-3)
    Z,rows = torch.stack([ae.z for ae in aes]),torch.arange(S, device=ctx.dev)[:,None]
    slot = global_slot(torch.zeros(128, dtype=torch.long, device=ctx.dev), K, 0.2)==K # The first fifth of a batch
    average,anyone = torch.ones(S, device=ctx.dev),torch.full((128,), K, device=ctx.dev)
    def step():
        i,at,noise = randint(len(label), (S,128), gen),randint(T, (S,128), gen),randn(S, 128, n_latent, gen=gen)
        zt = s.signal[at][...,None]*Z[rows,i]+s.spread[at][...,None]*noise
        loss = (net(zt, at, torch.where(slot, anyone, label[i]))-noise).square().mean((1,2))
        downhill(params, opt, loss.sum())
        average.lerp_(loss.detach(), 0.01)
    net.base.train()
    repeat = Repeat(step, gen, 2 if how=='conv' else 10)
    done = yield from steps(ctx, repeat, ctx.a.paper_steps, 6 if how=='conv' else 30)
    took,loss = time.time()-t,average.tolist()
    ctx.say(data, how, f'{S} models, {done} steps, {1e3*took/done:.2f} ms a step, loss {np.mean(loss):.3f}')
    del repeat
    net.base.eval()
    for o in params: o.grad = None
    common = dict(system='paper', how_heard=how, n_latent=n_latent, backbone='conv' if how=='conv' else 'mlp',
        labels=how!='plain', steps=done, seconds=round(took, 1), stacked=S, weights=size)
    metas = [dict(common, latents=m[1], seed=m[2], loss=l, ae_r2=ae.r2) for m,l,ae in zip(members, loss, aes)]
    models = [SimpleNamespace(name=named(data, how, m, n_latent), scale=m[0], back=ae.back, meta=meta, latents=m[1],
        want=dealt(CELLS[data].label, ctx.n, np.random.default_rng(m[2]))) for m,ae,meta in zip(members, aes, metas)]
    yield from sampled(ctx, net, models, data, how, gen, n_latent)

def sampled(ctx, net, models, data, how, gen, n_latent):
    "Cells of the models of a stack: labels dealt, or left open, and what a scorer keeps"
    K,n = len(CELLS[data].kinds),ctx.n
    chain = Chain(ctx, net, (len(models),n,n_latent), gen)
    todo = [('plain',0)] if how=='plain' else [('w0',0),('w-1',-1)]
    if how not in ('plain','film','conv'): todo = todo[:1]
    for name,w in todo:
        if time.time()>ctx.hard: return
        t = time.time()
        label = np.stack([np.full(n, K if w else 0) if w or how=='plain' else m.want for m in models])
        z = yield from chain.run(label.astype(np.int64))
        for m,own in zip(models, z):
            if w and m.latents=='fixed': continue
            with torch.no_grad(): native = m.back(own)
            ctx.emit(f'{m.name}-{name}', native, m.scale, data, 0, **m.meta, how=name,
                sample_seconds=round(time.time()-t, 1))
    del chain
    own = [i for i,m in enumerate(models) if m.latents=='ae']
    if how=='film' and own and time.time()<ctx.hard:
        yield from kept_by_scorers(ctx, net.some(own), [models[i] for i in own], data, gen, n_latent)

def kept_by_scorers(ctx, net, models, data, gen, n_latent):
    "Post-guidance: scorers of logged values, trained on training cells; the best 80 % of each label"
    S,n,rngs = len(models),ctx.n,[np.random.default_rng(m.meta['seed']+1) for m in models]
    chain,rounds = Chain(ctx, net, (S,n,n_latent), gen),[]
    def deal(): return np.stack([dealt(CELLS[data].label, n, r) for r in rngs])
    for _ in range(3): rounds.append((yield from chain.run(deal())))
    def logged(m, z):
        with torch.no_grad(): return m.back(z) if m.scale=='log' else m.back(z).log1p()
    fake = torch.stack([logged(m, torch.cat([z[j] for z in rounds])) for j,m in enumerate(models)])
    real,nets = ctx.x[data]['log'],[]
    for m in models:
        generator(ctx, 'scorer', m.name)
        nets.append(own_dropout(Scorer(real.shape[1]), gen).to(ctx.dev))
    scorer,rows = Stack(nets),torch.arange(S, device=ctx.dev)[:,None]
    params,opt = optimiser(torch.optim.AdamW, scorer.params, 1e-3)
    truth = (torch.arange(128, device=ctx.dev)//64).repeat(S)
    def step():
        some = torch.cat([fake[rows,randint(fake.shape[1], (S,64), gen)],real[randint(len(real), (S,64), gen)]], 1)
        downhill(params, opt, F.cross_entropy(scorer(some).flatten(0, 1), truth, reduction='sum')/128)
    scorer.base.train()
    done = yield from steps(ctx, Repeat(step, gen, 10), ctx.a.paper_steps//6, 30)
    scorer.base.eval()
    yield from best_of(ctx, chain, scorer, models, logged, data, done)

def best_of(ctx, chain, scorer, models, logged, data, scorer_steps):
    "Candidates in two rounds, and the best of each label"
    n,asked = ctx.n,[np.sort(candidates(m.want, 0.8)) for m in models]
    first = yield from chain.run(np.stack([np.resize(a[::2], n) for a in asked]))
    second = yield from chain.run(np.stack([np.resize(a[1::2], n) for a in asked]))
    z = [torch.cat([f[:len(a[::2])],s[:len(a[1::2])]]) for f,s,a in zip(first, second, asked)]
    for j,(m,a) in enumerate(zip(models, asked)):
        label = np.concatenate([a[::2],a[1::2]])
        with torch.no_grad(): score = scorer.some([j])(logged(m, z[j])[None])[0].softmax(1)[:,1].cpu().numpy()
        best = keep_best(score, label, {k: int(c) for k,c in enumerate(np.bincount(m.want)) if c})
        with torch.no_grad(): native = m.back(z[j][torch.from_numpy(best).to(ctx.dev)])
        ctx.emit(f'{m.name}-w0-post', native, m.scale, data, 0, **m.meta, how='w0, scorer keeps 80 %',
            scorer_steps=scorer_steps)

# ---------------------------------------------------------------- others

@torch.no_grad()
def fakes(G, z, code, fade):
    "What `G` makes, training, of several batches in a row, at once, each by its own statistics; `fade`: their weights"
    (B,n),v = z.shape[:2],z.flatten(0, 1)
    for linear,cbn in zip(G.linear, G.norm):
        h,norm = linear(v).unflatten(0, (B,n)),cbn.norm
        var,mean = torch.var_mean(h, 1, correction=0, keepdim=True)
        m = norm.momentum
        norm.running_mean.mul_((1-m)**B).add_((fade[:,None]*mean[:,0]).sum(0))
        norm.running_var.mul_((1-m)**B).add_((fade[:,None]*var[:,0]).sum(0)*(n/(n-1)))
        v = ((h-mean)*(var+norm.eps).rsqrt()).flatten(0, 1)
        v = (cbn.scale(code.flatten())*v+cbn.offset(code.flatten())).relu()
    return G.out(v).unflatten(0, (B,n))

def gan(ctx, data, conditional, seed, milestones, lr=1e-4, total=20_000., momentum=0.001, life=1_000_000):
    "scGAN or cscGAN at published widths, rates and sums"
    gen,t,x = generator(ctx, 'gan', data, conditional, seed),time.time(),ctx.x[data]['raw']
    label = ctx.label[data] if conditional else torch.zeros_like(ctx.label[data])
    K,n = int(label.max())+1,len(label)
    G = Generator(x.shape[1], 128, [256,512,1024], K, momentum, total).to(ctx.dev)
    D = Critic(x.shape[1], [1024,512,256], K).to(ctx.dev)
    fade = torch.tensor([momentum*(1-momentum)**(4-b) for b in range(5)], device=ctx.dev)
    (pd,od),(pg,og) = (optimiser(torch.optim.Adam, m, lr, betas=(0.5,0.9), amsgrad=True) for m in (D,G))
    def critic(real, kind, fake, u):
        made,seen = D(torch.cat([fake,real]), torch.cat([kind,kind])).chunk(2)
        downhill(pd, od, (made-seen).mean()+10*gradient_penalty(lambda v: D(v, kind), real, fake, u))
    def step():
        i,z = randint(n, (6,128), gen),randn(6, 128, 128, gen=gen)
        u = torch.rand(5, 128, 1, generator=gen, device=ctx.dev)
        kind,real = label[i],x[i[:5]]*(total/TOTAL)
        fake = fakes(G, z[:5], kind[:5], fade) # `G` stands still while the critic moves five times
        for b in range(5): critic(real[b], kind[b], fake[b], u[b])
        downhill(pg, og, -D(G(z[5], kind[5]), kind[5]).mean())
        for o in (od,og): fall(o, 0.1**(1/life))
    G.train()
    repeat,name = Repeat(step, gen, 5),f'{data}-{"cscgan" if conditional else "scgan"}-published-{seed}'
    kind = torch.from_numpy(dealt(label.cpu().numpy(), ctx.n, np.random.default_rng(seed))).to(ctx.dev)
    for goal in milestones:
        done = yield from steps(ctx, repeat, goal, 10)
        G.eval()
        with torch.no_grad(): native = G(randn(ctx.n, 128, gen=gen), kind)*(TOTAL/total)
        G.train()
        last = ctx.over() or goal==milestones[-1]
        meta = dict(system='cscGAN' if conditional else 'scGAN', variant='published', seed=seed, steps=done,
            published_steps=life, seconds=round(time.time()-t, 1))
        ctx.emit(f'{name}-{done}', native, 'raw', data, 0 if last else 2, **meta)
        ctx.say(name, f'{done} steps, {1e3*(time.time()-t)/done:.2f} ms a step')
        if ctx.over(): return

def activa(ctx, data, scale, seed, epochs, warm_epochs=10):
    "ACTIVA by epochs of its script, at published widths and rate"
    gen,t,x,label = generator(ctx, 'activa', data, scale, seed),time.time(),ctx.x[data][scale],ctx.label[data]
    (n,G),K = x.shape,len(CELLS[data].kinds)
    layers = [l for i,o in ((G,100),(100,50),(50,25)) for l in (nn.Linear(i, o),nn.ReLU())]
    judge_,net = nn.Sequential(*layers, nn.Linear(25, K)).to(ctx.dev),IntroVAE(G, 128, [1024,512,256]).to(ctx.dev)
    params,opt = optimiser(torch.optim.AdamW, judge_, 1e-3)
    def learn_kinds(): i = randint(n, 128, gen); downhill(params, opt, F.cross_entropy(judge_(x[i]), label[i]))
    yield from steps(ctx, Repeat(learn_kinds, gen, 10), ctx.a.paper_steps//10, 30)
    (pe,oe),(pd,od) = (optimiser(torch.optim.Adam, m, 2e-4) for m in (net.encoder,net.decoder))
    def both(loss):
        for p,g in zip([*pe,*pd], torch.autograd.grad(loss, [*pe,*pd])): p.grad = as_laid(p, g)
        oe.step(); od.step()
    def sample(x):
        mean,s = net.posterior(x)
        return mean,s,net.decoder(mean+s*randn(*s.shape, gen=gen))
    def warm():
        b = x[randint(n, 128, gen)]
        mean,s,rec = sample(b)
        both((rec-b).square().sum(1).mean()+latent_kl(mean, s).mean())
    def adversarial():
        b = x[randint(n, 128, gen)]
        mean,s,rec = sample(b)
        fake = net.decoder(randn(128, 128, gen=gen))
        rebuilt = (rec-b).square().sum(1).mean()+(judge_(rec)-judge_(b)).square().sum(1).mean()
        both(margin_loss(latent_kl(mean, s).mean(), net.energy(rec.detach()), net.energy(fake.detach()))+0.05*rebuilt)
    net.train()
    per,done,name,repeat = n//128,0,f'{data}-activa-{scale}-{seed}',None
    for goal,step in ((warm_epochs,warm), *((e,adversarial) for e in epochs)):
        if repeat is None or step is not was: repeat,was = Repeat(step, gen, 10, done),step
        done = yield from steps(ctx, repeat, goal*per, 20)
        if step is warm: continue
        net.eval()
        with torch.no_grad(): native = net.decoder(randn(ctx.n, 128, gen=gen))
        net.train()
        last = ctx.over() or goal==epochs[-1]
        meta = dict(system='ACTIVA', variant=scale, seed=seed, steps=done, epochs=round(done/per, 1),
            published_epochs=500, seconds=round(time.time()-t, 1))
        ctx.emit(f'{name}-{done}', native, scale, data, 0 if last else 2, **meta)
        if ctx.over(): break
    ctx.say(name, f'{done} steps, {1e3*(time.time()-t)/max(done, 1):.2f} ms a step')

def latent(ctx, data, seed, milestones):
    "A model after scDiffusion at published widths, on logged values, without labels"
    gen,t,x,s = generator(ctx, 'latent', data, seed),time.time(),ctx.x[data]['log'],schedule(ctx)
    n,G = x.shape
    ae,net = LatentAE(G, 128, [1024,1024,1024]).to(ctx.dev),SkipMLP(128, [512,512,256,128]).to(ctx.dev)
    pa,oa = optimiser(torch.optim.AdamW, ae, 5e-4)
    def rebuild(): b = x[randint(n, 128, gen)]; downhill(pa, oa, F.mse_loss(ae(b), b))
    ae.train()
    ae_done = yield from steps(ctx, Repeat(rebuild, gen, 10), 2*ctx.a.ae_steps, 40)
    ae.eval()
    with torch.no_grad(): z0 = torch.cat([ae.encode(b) for b in x.split(1000)])
    pn,on = optimiser(torch.optim.AdamW, net, 1e-4, weight_decay=1e-4)
    def step():
        i,at,noise = randint(n, 128, gen),randint(T, 128, gen),randn(128, 128, gen=gen)
        downhill(pn, on, F.mse_loss(net(s.signal[at][:,None]*z0[i]+s.spread[at][:,None]*noise, at), noise))
    repeat,name = Repeat(step, gen, 10),f'{data}-latent-{seed}'
    chain = Chain(ctx, lambda z, t, label: net(z, t), (ctx.n,128), gen)
    for goal in milestones:
        done = yield from steps(ctx, repeat, goal, 40)
        took = round(time.time()-t, 1)
        z = yield from chain.run(np.zeros(ctx.n, int))
        with torch.no_grad(): native = ae.decoder(z).clamp(0, float(np.log1p(TOTAL)))
        last = ctx.over() or goal==milestones[-1]
        meta = dict(system='latent diffusion', seed=seed, steps=done, published_steps=600_000,
            ae_steps=ae_done, seconds=took)
        ctx.emit(f'{name}-{done}', native, 'log', data, 0 if last else 2, **meta)
        ctx.say(name, f'{done} steps, {1e3*took/done:.2f} ms a step with the autoencoder')
        if ctx.over(): return

# ---------------------------------------------------------------- the plan

NEAREST = dict(zheng17_sorted='raw', neurons10k='log') # The reading that came nearest to the paper's figures
CURVE = 1000,2000,5000,10_000,20_000,30_000,50_000,75_000,100_000,150_000,200_000,300_000,500_000,1_000_000

def plan(a):
    "Lanes in order of worth: jobs, priority, seconds to stop before the others, and must they end?"
    seeds,tiny = (0,1,2),a.smoke
    curve,far = ((30,60),(30,60)) if tiny else (CURVE,(20_000,50_000,100_000,200_000,400_000,600_000))
    epochs,warm = ((2,3),1) if tiny else ((20,50,100,200,350,500),10)
    own = {d: [(s,'ae',k) for s in VIEWS for k in seeds] for d in SETS}
    film = {d: own[d]+[('raw','linear',k) for k in seeds]+[(NEAREST[d],'fixed',k) for k in range(4)] for d in SETS}
    fusion = {d: [(NEAREST[d],'fixed',k) for k in range(4)] for d in SETS}
    must = [[(autoencoders,d,'log',seeds),(stack,d,'plain',own[d])] for d in SETS]
    must += [[(autoencoders,d,'raw',seeds),(stack,d,'film',film[d])] for d in SETS]
    must += [[(linear_autoencoder,d,'raw'),(stack,d,'beside',fusion[d])] for d in SETS]
    must += [[(stack,d,how,fusion[d])] for how in ('onto','among') for d in SETS]
    rest = [(0,[(gan,d,c,0,curve)]) for c in (False,True) for d in SETS]
    rest += [(0,[(activa,d,s,0,epochs,warm)]) for s in VIEWS for d in SETS]
    rest += [(25,[(latent,d,0,far)]) for d in SETS]
    rest += [(15,[(stack,d,how,fusion[d])]) for how in ('filmcat','filmattention') for d in SETS]
    rest += [(60,[(stack,d,'conv',[(NEAREST[d],'ae',0)])]) for d in SETS]
    return [(j,-2,0,True) for j in must]+[(j,-1 if j[0][0] is gan else 0,early,False) for early,j in rest]

class Lane:
    "A stream and the jobs on it"
    def __init__(self, ctx, jobs, priority=0, early=0, must=False):
        self.ctx,self.jobs,self.job,self.asked,self.events = ctx,deque(jobs),None,None,deque()
        self.early,self.must,self.held,self.count,self.goal,self.seen,self.what = early,must,False,0,0,(0,0.),None
        self.stream = torch.cuda.Stream(priority=priority) if ctx.dev.type=='cuda' else None
    def alive(self): return bool(self.job or (self.jobs and not self.over()))
    def over(self): return time.time()>self.ctx.stop-self.early
    def ready(self):
        if (self.held and not self.over()) or not self.alive(): return False
        while self.events and self.events[0].query(): self.events.popleft()
        return len(self.events)<(1 if self.asked in ('drain','wait') else 2)
    def advance(self):
        "Queue some more work; False where there is none"
        if self.job is None:
            if not self.jobs or self.over(): return False
            self.what,self.count,self.goal,self.seen = self.jobs.popleft(),0,0,(0,0.)
            self.job = self.what[0](self.ctx, *self.what[1:])
        try: self.asked = next(self.job)
        except StopIteration: self.job = self.asked = None
        except Exception:
            self.job = self.asked = None
            self.ctx.say('FAILED', self.label(), traceback.format_exc())
        return self.asked!='wait'
    def go(self):
        "`advance` on the lane's stream"
        self.ctx.here = self
        try:
            if self.stream is None: return self.advance()
            with torch.cuda.stream(self.stream):
                moved = self.advance()
                if moved: self.events.append(torch.cuda.Event()); self.events[-1].record()
            return moved
        finally: self.ctx.here = None
    def label(self):
        "A short name of the job"
        f,*args = self.what or (None,)
        plain = dict(zip(SETS, ('blood','brain')))
        said = [plain.get(v, str(v)) for v in args if not isinstance(v, tuple|list)]
        return '-'.join([getattr(f, '__name__', '?'),*said])
    def left(self):
        "Steps that this lane still owes"
        a = self.ctx.a
        later = sum(dict(autoencoders=a.ae_steps, stack=a.paper_steps).get(j[0].__name__, 0) for j in self.jobs)
        return max(self.goal-self.count, 0)*bool(self.job)+later

def progress(ctx, lanes):
    "One line: steps and milliseconds a step of each lane since the last line, and what waits"
    now,said = time.time(),[]
    for l in lanes[1:]:
        if l.job is None: continue
        count,at = l.seen
        pace = f'{1e3*(now-at)/(l.count-count):.1f}' if at and l.count>count else '-'
        said.append(f'{l.label()} {l.count}/{l.goal} {pace}{" held" if l.held else ""}')
        l.seen = (l.count,now)
    ctx.say('PACE', '; '.join(said), '| components wait', len(ctx.pools), '| judges wait',
        sum(w[0]<10 for w in ctx.waiting), 'run', len(ctx.running), '| judged', len(ctx.judged))

def govern(ctx, lanes, marks):
    "Hold back lanes of less worth, the last first, while those that must end would end too late"
    now,late = time.time(),-1e9
    for l in lanes:
        if not l.must or not l.job: continue
        what,count,at = marks.get(l, (None,0,0.))
        if what is l.what and l.count>count:
            late = max(late, now+l.left()*(now-at)/(l.count-count)-(ctx.stop-ctx.a.reserve))
        marks[l] = l.what,l.count,now
    rest = [l for l in lanes if not l.must and l.job is not None][1:] # The first one makes components
    if late>0:
        for l in [l for l in rest if not l.held][-2:]: l.held = True
    elif late<-30:
        for l in [l for l in rest if l.held][:1]: l.held = False

def provenance(a, ctx):
    "What the figures hang on"
    import sklearn, scld
    sha = lambda f: hashlib.sha256(Path(f).read_bytes()).hexdigest()[:16]
    gpu = torch.cuda.get_device_name() if a.device=='cuda' else 'cpu'
    return dict(provenance=True, device=gpu, torch=torch.__version__,
        numpy=np.__version__, sklearn=sklearn.__version__,
        python=platform.python_version(),
                card_sha256=sha(__file__), code_sha256={m: sha(Path(scld.__file__).parent/f'{m}.py') for m in MODULES},
                cells_sha256={d: c.sha for d,c in CELLS.items()}, settings=vars(a),
                    tf32=torch.backends.cuda.matmul.allow_tf32)

def begin(a):
    "Cells, workers, device: what there must be before the first lane"
    from multiprocessing import get_context
    Path(a.out).mkdir(parents=True, exist_ok=True)
    if a.smoke: a.paper_steps,a.ae_steps,a.chain = (min(60, v) for v in (a.paper_steps,a.ae_steps,a.chain))
    for d in SETS: CELLS[d] = read_cells(a.cells, d, a.genes)
    pool = get_context('fork').Pool(a.workers) # Before anything touches the GPU
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(1)
    Attend.forward = by_softmax
    ctx = Context(a, pool)
    ctx.row(**provenance(a, ctx))
    start_ladder(ctx)
    if a.device=='cuda':
        at_once(principal_scores(torch.cat([ctx.test[SETS[0]]['raw'],ctx.x[SETS[0]]['raw'][:ctx.n]]))) # Libraries load
        torch.cuda.synchronize()
        faster_convolution(ctx)
    return ctx

def check(ctx):
    "What only a device can show: graphs count and draw anew, components are those of the library"
    gen,cuda = generator(ctx, 'check'),ctx.dev.type=='cuda'
    n,drawn = torch.zeros(1, dtype=torch.long, device=ctx.dev),torch.zeros(99, device=ctx.dev)
    def step(): drawn.index_copy_(0, n, torch.rand(1, generator=gen, device=ctx.dev)); n.add_(1)
    if cuda: torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) if cuda else nullcontext():
        repeat = Repeat(step, gen, 10)
        repeat(45)
    if cuda: torch.cuda.synchronize()
    ctx.say('graphs: counted', repeat.done, 'taken', n.item(), 'different', drawn[:60].unique().numel(), 'of 60')
    d = SETS[0]
    for v in VIEWS:
        x = ctx.test[d][v],ctx.x[d][v][:ctx.n]
        z,y = at_once(principal_scores(torch.cat(x))).cpu().numpy(),pool_pcs(*(p.cpu().numpy() for p in x))
        cos = np.abs((z*y).sum(0))/np.linalg.norm(z, axis=0)/np.linalg.norm(y, axis=0)
        ctx.say(f'components, {v}: cosines with those of the library at least 1-{1-cos.min():.0e}')

def finish(ctx, why='ended'):
    "Write what is to come back, say what is lost, and leave"
    try: ctx.keep_rest(); ctx.flush()
    except Exception: ctx.say(traceback.format_exc())
    todo = [k for k,s in ctx.sets.items() if (k,s.scale) not in ctx.judged]
    lost = [k for k in todo if (k,ctx.sets[k].scale) not in ctx.kept]
    ctx.say(f'{why};', len(ctx.sets), 'sets,', len(todo), 'not judged on their own scale; lost', len(lost), *lost)
    shutil.rmtree(ctx.tmp, ignore_errors=True)
    threading.Timer(5, os._exit, [0]).start()
    ctx.pool.terminate()
    os._exit(0)

def make(a):
    "Train, sample and judge until the deadline"
    ctx = begin(a)
    if a.smoke: check(ctx)
    rescue = threading.Timer(ctx.end+4-time.time(), finish, (ctx,'the device does not answer'))
    rescue.daemon = True
    rescue.start()
    lanes = [Lane(ctx, [(components,)], -3)]
    for jobs,*how in plan(a):
        lanes.append(Lane(ctx, [j for j in jobs if not a.only or j[0].__name__ in a.only.split(',')], *how))
    ctx.say('ready', len(lanes)-1, 'lanes', provenance(a, ctx)['device'])
    gc.collect(); gc.freeze(); gc.disable() # Nothing is to be collected during a capture
    try: turn(ctx, lanes)
    except BaseException: ctx.say('BROKEN OFF', traceback.format_exc())
    rescue.cancel()
    progress(ctx, lanes)
    if a.device=='cuda': ctx.say('memory', round(torch.cuda.max_memory_allocated()/2**30, 1), 'GiB')
    finish(ctx)

def turn(ctx, lanes):
    "Give each lane its turn, serve the judges, write what is to come back"
    flushed = told = governed = time.time()
    marks = {}
    while time.time()<ctx.end-5:
        moved = [l.go() for l in lanes if l.ready()]
        try: ctx.serve()
        except Exception: ctx.say('SERVE', traceback.format_exc())
        now = time.time()
        if now-flushed>25: ctx.flush(); gc.collect(1); flushed = now
        if now-told>ctx.a.tell: progress(ctx, lanes); told = now
        if now-governed>6: govern(ctx, lanes, marks); governed = now
        if not any(moved): time.sleep(0.0005)
        busy = any(l.alive() for l in lanes[1:]) or ctx.pools or ctx.shared.get('ladder')
        if not busy and not ctx.running and lanes[0].asked=='wait' and all(w[0]>=10 for w in ctx.waiting): break

def start_ladder(ctx):
    "The systems that need no GPU, made by the workers and judged like the others"
    ctx.shared['ladder'] = waiting = {}
    for data in SETS:
        for row in LADDER if not ctx.a.only else ():
            path = str(ctx.tmp/f'{data}-{row}.npy')
            waiting[data,row] = path,ctx.pool.apply_async(ladder, (data,row,0,path,ctx.n))
    serve = ctx.serve
    def also():
        for data,row in [k for k,(_,r) in waiting.items() if r.ready()]:
            path,result = waiting.pop((data,row))
            try: seconds,native = result.get(),torch.from_numpy(np.load(path)).to(ctx.dev)
            except Exception: ctx.say('FAILED', data, row, traceback.format_exc()); continue
            ctx.emit(f'{data}-{row}-0', native, 'raw', data, 1, system=row, seed=0, seconds=round(seconds, 1))
        serve()
    ctx.serve = also

# ---------------------------------------------------------------- at home

def judge(a):
    "Keep the rows of a run, and judge the components that came back where they were not judged; goes on where it ended"
    for d in SETS: CELLS[d] = read_cells(a.cells, d, a.genes)
    out,arrays = Path(a.rows),{}
    out.mkdir(parents=True, exist_ok=True)
    rows = keep_rows(a, out)
    for f in sorted(Path(a.out).glob('pack*.npz')): arrays |= {k: v for k,v in np.load(f).items()}
    known = json.loads((out/'again.json').read_text()) if (out/'again.json').exists() else {}
    for name,view,trees in missing(rows, arrays, a):
        if (key := f'{name}/{view}/{trees}') in known or a.only not in key: continue
        z,t = arrays[f'{name}/pcs_{view}'],time.time()
        n_test = len(z)-a.made
        known[key] = short(dict(see='pcs', trees=trees, n=a.made, **judge_pcs(z, n_test, view, trees)))
        (out/'again.json').write_text(json.dumps(known, indent=1)+'\n')
        print(key, known[key], f'{time.time()-t:.0f} s', flush=True)

def missing(rows, arrays, a):
    "What came back and was not judged, own scale first; with `--again`, own scales once more with more trees"
    done = {(k,v,j['trees']) for k,r in rows.items() for j in r['judged'] for v in VIEWS if f'auc_{v}' in j}
    have = [(k.rsplit('/pcs_', 1)) for k in arrays]
    have = sorted((k,v) for k,v in have if k in rows)
    own = [(k,v) for k,v in have if v==rows[k]['scale']]
    todo = [(k,v,a.trees) for k,v in own+[h for h in have if h not in own]]
    return [t for t in todo+[(k,v,a.more) for k,v in own if a.again] if t not in done]

def keep_rows(a, out):
    "The lines of a run as two files: what the figures hang on, and a row for each set of cells; returns these"
    lines = [json.loads(l) for l in (Path(a.out)/'rows.jsonl').read_text().splitlines()]
    rows = {r['name']: {k: v for k,v in r.items() if k not in ('name','made')}|dict(judged=[])
        for r in lines if r.get('made')}
    for r in lines:
        if 'judged' in r: join_judgement(rows[r['name']]['judged'], r['judged'])
        if 'facts' in r: rows[r['name']]['facts'] = r['facts']
    run = {k: v for k,v in lines[0].items() if k!='provenance'}
    run['settings'] = {k: v for k,v in run['settings'].items() if k not in ('cells','out','rows','only','stage')}
    trained = {k: r for k,r in rows.items() if r.get('steps', 99)>10} # The steps before a graph is made
    lost = dict(not_trained=[k for k in rows if k not in trained],
        not_judged=[k for k,r in trained.items() if not any(f"auc_{r['scale']}" in j for j in r['judged'])])
    (out/'run.json').write_text(json.dumps(run|lost, indent=1)+'\n')
    text = ',\n'.join(f'{json.dumps(k)}: {json.dumps(short(r))}' for k,r in trained.items())
    (out/'rows.json').write_text('{\n'+text+'\n}\n')
    return trained

def join_judgement(known, new):
    "Both scales of one judgement stand together"
    for j in known:
        if j['trees']==new['trees']: j |= new; return
    known.append(dict(new))

def short(v):
    "The same with four digits after the point"
    if isinstance(v, dict): return {k: short(x) for k,x in v.items()}
    return [short(x) for x in v] if isinstance(v, list) else round(v, 4) if isinstance(v, float) else v

class Home(Context):
    "What `stack` needs of a run, on a CPU, where cells are judged as they come"
    def __init__(self, a, data, scale):
        self.a,self.dev,self.t0,self.sample_steps,self.n = a,torch.device('cpu'),time.time(),a.chain,a.made
        self.shared,self.known,self.means,self.here,self.hard,self.stop = {},{},{},None,float('inf'),float('inf')
        x = self.dense(CELLS[data].train)
        self.x = {data: {scale: x.log1p() if scale=='log' else x}}
        self.label = {data: torch.from_numpy(CELLS[data].label)}
    def emit(self, name, native, scale, data, rank, **meta):
        out = short(judge_values(native.numpy(), scale, data, self.a.trees)|meta)
        self.known[name] = out
        (Path(self.a.rows)/'linear.json').write_text(json.dumps(self.known, indent=1)+'\n')
        self.say(name, out)

def home(a):
    "The paper's diffusion in the latents of the best linear autoencoder, here"
    data,scale,k = a.only.split(',')
    CELLS[data] = read_cells(a.cells, data, a.genes)
    torch.set_num_threads(1)
    Path(a.rows).mkdir(parents=True, exist_ok=True)
    here = Home(a, data, scale)
    at_once(linear_autoencoder(here, data, scale, int(k)))
    at_once(stack(here, data, 'film', [(scale,'linear',0)], int(k)))

def main():
    "One stage"
    p = argparse.ArgumentParser(description='One run on a borrowed GPU')
    p.add_argument('stage', choices=['prepare','make','judge','home'])
    p.add_argument('--cells', default='.card', help='folder made by `prepare`')
    p.add_argument('--out', default='out')
    p.add_argument('--rows', default='nbs/results/card')
    p.add_argument('--device', default='cuda')
    p.add_argument('--only', default='')
    p.add_argument('--smoke', action='store_true', help='a few steps of everything')
    p.add_argument('--again', action='store_true', help='`judge`: also with more trees')
    for k,v in dict(deadline=500, tail=75, reserve=90, tell=30, workers=13, trees=300, more=1000, made=1500,
        paper_steps=20_000, ae_steps=10_000, chain=T, genes=0).items():
        p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--widths', type=int, nargs='+', default=[256,192,128], help='of the U-Net')
    a = p.parse_args()
    dict(prepare=prepare, make=make, judge=judge, home=home)[a.stage](a)

if __name__=='__main__': main()
