"""One run on a borrowed GPU: the paper's model by readings, GANs and kin at published widths, judged as they come.

    python card.py prepare --out FOLDER                   cells, the package and this script, ready to be carried
    python card.py make --cells FOLDER --out OUT --device cuda --deadline 500
    python card.py make ... --smoke                       a few hundred steps of each kind of training
    python card.py speed --cells FOLDER --out OUT --device cuda     the default model: seconds by stage
    python card.py judge --cells FOLDER --out OUT --rows nbs/results/card      what came back, judged again here
    python card.py home --cells FOLDER --only neurons10k,raw,128 --rows …   one model in principal components, here

`make` runs many trainings at once in one process: each is a generator that queues some steps on a stream of its own and
yields; steps are CUDA graphs. Cells go to worker processes that judge them while training goes on. On a CPU the same
code runs without streams and graphs. Needs numpy, scipy, scikit-learn, torch, fastcore and anndata; no scanpy.
"""
import argparse, hashlib, heapq, json, os, platform, shutil, sys, tempfile, time, traceback, warnings
from collections import deque
from itertools import count
from pathlib import Path
from types import SimpleNamespace
for k in ('OMP_NUM_THREADS','MKL_NUM_THREADS','LOKY_MAX_CPU_COUNT'): os.environ.setdefault(k, '1')
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
from scld.unet import Conv, UNet

SETS = 'zheng17_sorted','neurons10k'
TOTAL,T,N = 20_000,1000,1500 # Sum of a scaled cell, steps of the chain, cells to make and judge
MODULES = ('adversarial','autoencoder','baselines','diffusion','latent','metrics','post_guidance','pre_guidance',
    'unet')
PACK,PACKS = 10_000_000,6 # Bytes of a file of arrays, and how many such files at most

# ---------------------------------------------------------------- cells

def prepare(a):
    "Write what the run needs into a folder: cells, package, script"
    from scld.runs import LABELS, experiment_cells, provenance
    import scld
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    for d in SETS:
        train,test = experiment_cells(d, 'laptop')
        parts = {f'{k}_{p}': getattr(v.X, p)
            for k,v in dict(train=train, test=test).items() for p in ('data','indices','indptr')}
        small = {k: v.astype(np.int32 if k.endswith('indptr') else np.int16) for k,v in parts.items()}
        code = {f'{k}_label': v.obs[LABELS].cat.codes.to_numpy(np.int8) for k,v in dict(train=train, test=test).items()}
        kinds,genes = list(map(str, train.obs[LABELS].cat.categories)),np.array(list(map(str, train.var_names)))
        np.savez_compressed(out/f'{d}.npz', **small, **code,
            kinds=kinds, genes=genes, sha=provenance(d, 'laptop')['cells_sha256'])
    shutil.copytree(Path(scld.__file__).parent, out/'scld',
        dirs_exist_ok=True, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(__file__, out/'card.py')

def read_cells(folder, name, genes=0):
    "Counts of training and test cells, labels, and the hash of the experiment; only some genes for a rehearsal"
    f = np.load(Path(folder)/f'{name}.npz')
    shape = lambda k: (len(f[f'{k}_indptr'])-1,len(f['genes']))
    csr = lambda k: sparse.csr_matrix((f[f'{k}_data'].astype(np.float32),f[f'{k}_indices'].astype(np.int32),
        f[f'{k}_indptr']), shape=shape(k))
    some = np.sort(np.argsort(-csr('train').sum(0).A1)[:genes or None])
    return SimpleNamespace(name=name, train=csr('train')[:,some], test=csr('test')[:,some],
        label=f['train_label'].astype(np.int64),
                           kinds=list(map(str, f['kinds'])), genes=f['genes'][some], sha=str(f['sha']))

def scaled(X):
    "Counts scaled to a sum of 20,000, without logarithm"
    return sparse.diags(TOTAL/X.sum(1).A1)@X

def dealt(label, n, rng):
    "Labels of `n` cells, as common as among the training cells, in random order"
    size = np.bincount(label)
    many = np.diff(np.floor(n*size.cumsum()/size.sum()+rng.random()).astype(int), prepend=0)
    return rng.permutation(np.repeat(np.arange(len(size)), many))

# ---------------------------------------------------------------- judging, in worker processes

CELLS = {} # Set by `make` and `judge` before the workers start

def views(native, scale):
    "Values of a system as scaled values and as their logarithm; `scale` says what they are"
    raw = np.expm1(native) if scale=='log' else native
    return dict(raw=raw, log=native if scale=='log' else np.log1p(raw))

def judge_values(native, scale, data, trees, see='pcs', seed=0):
    "Forest and MMD² on 50 components of the pool, or a forest on all genes, for scaled and for logged values"
    out,pcs,test = dict(see=see, trees=trees, n=int(native.shape[0])),{},scaled(CELLS[data].test)
    for name,y in views(native, scale).items():
        x = test.log1p() if name=='log' else test
        if see=='genes': z = x.toarray(),np.asarray(y, np.float32)
        else:
            pcs[name] = pool_pcs(x, y)
            z = pcs[name][:x.shape[0]],pcs[name][x.shape[0]:]
            out[f'mmd2_e3_{name}'] = 1e3*float(mmd2_sides(pcs[name], sides(*map(len, z)))[0])
        auc = rf_auc(*z, 'genes-5fold', trees, seed)
        out[f'auc_{name}'],out[f'auc_{name}_sd'] = float(auc.mean()),float(auc.std())
    return out,{k: v.astype(np.float16) for k,v in pcs.items()}

def judge_file(path, *how):
    "`judge_values` of a file"
    warnings.simplefilter('ignore')
    t = time.time()
    try: return (*judge_values(np.load(path), *how),time.time()-t)
    except Exception: return traceback.format_exc(),{},time.time()-t

LADDER = dict(positive=('Positive',{}), random=('Random',{}), splatter=('Splatter',dict(match=False)),
    splatter_match=('Splatter',{}),
              sugar=('SUGAR',dict(counts=None)), sugar_t0=('SUGAR',dict(counts=None, t=0)))

def ladder(data, row, seed, path):
    "Cells of a system that needs no GPU, written to a file; how long it took"
    from anndata import AnnData
    import pandas as pd
    t,c = time.time(),CELLS[data]
    name,own = LADDER[row]
    obs = pd.DataFrame(dict(cell_type=pd.Categorical.from_codes(c.label, c.kinds)),
        index=[f'c{i}' for i in range(len(c.label))])
    a = AnnData(c.train, obs=obs, var=pd.DataFrame(index=c.genes))
    made = baselines[name](**own).fit(a, labels='cell_type', seed=seed).sample(N, seed=seed).X
    values = made if 'counts' in own else scaled(made)
    np.save(path, values.toarray().astype(np.float32))
    return time.time()-t

# ---------------------------------------------------------------- what a run shares

class Context:
    "Data on the device, the clock, the workers, and the files that come back"
    def __init__(self, a, pool):
        self.a,self.dev,self.out,self.t0 = a,torch.device(a.device),Path(a.out),time.time()
        self.stop,self.hard,self.end = self.t0+a.deadline-a.tail,self.t0+a.deadline-0.5*a.tail,self.t0+a.deadline
        self.pool,self.waiting,self.running,self.order,self.shared,self.packs = pool,[],[],count(),{},[{}]
        self.pack_bytes,self.dirty,self.sample_steps = [0],False,a.chain
        room = shutil.disk_usage('/dev/shm').free if Path('/dev/shm').exists() else 0
        self.tmp = Path(tempfile.mkdtemp(dir='/dev/shm' if room>2e10 else None))
        self.rows = open(self.out/'rows.jsonl', 'a')
        self.x,self.label = {},{}
        for d,c in CELLS.items():
            raw = torch.from_numpy(scaled(c.train).toarray()).float().to(self.dev)
            self.x[d] = dict(raw=raw, log=raw.log1p())
            self.label[d] = torch.from_numpy(c.label).to(self.dev)
    def over(self): return time.time()>self.stop
    def say(self, *what): print(f'[{time.time()-self.t0:6.1f}]', *what, flush=True)
    def row(self, **kw): self.rows.write(json.dumps(kw)+'\n'); self.rows.flush()

    def emit(self, name, native, scale, data, again=True, first=1, **meta):
        "Hand cells to the judges"
        path = str(self.tmp/f'{name}.npy')
        np.save(path, native.detach().float().cpu().numpy())
        self.judge(name, path, scale, data, again, first, meta)

    def judge(self, name, path, scale, data, again, first, meta):
        "Queue the judges of a file: few trees soon, many and all genes when there is nothing else"
        self.row(name=name, made=True, data=data, scale=scale, at=round(time.time()-self.t0, 1), **meta)
        jobs = [(first,self.a.trees,'pcs')]
        if again: jobs.append((5+first,self.a.more,'pcs'))
        if again=='genes': jobs.append((9,self.a.trees,'genes'))
        for rank,trees,see in jobs:
            heapq.heappush(self.waiting, (rank,next(self.order),name,judge_file,(path,scale,data,trees,see)))

    def keep(self, name, array):
        "Put an array into a file that comes back, as long as there is room"
        if self.pack_bytes[-1]+array.nbytes>PACK: self.flush(); self.packs.append({}); self.pack_bytes.append(0)
        if len(self.packs)>PACKS:
            self.say('no room for', name)
            self.packs[-1],self.pack_bytes[-1] = {},PACK
            return
        self.packs[-1][name],self.dirty = array,True
        self.pack_bytes[-1] += array.nbytes

    def flush(self):
        "Write the file of arrays that is being filled"
        if not self.dirty or len(self.packs)>PACKS: return
        part = self.out/f'pack{len(self.packs)-1}.part'
        with open(part, 'wb') as f: np.savez(f, **self.packs[-1])
        part.replace(part.with_suffix('.npz'))
        self.dirty = False

    def serve(self):
        "Start judges that wait, collect those that are done"
        for r in [r for r in self.running if r[1].ready()]:
            self.running.remove(r)
            self.done(r[0], *r[1].get())
        while self.waiting and len(self.running)<self.a.workers:
            _,_,name,f,args = heapq.heappop(self.waiting)
            self.running.append((name,self.pool.apply_async(f, args)))

    def done(self, name, figures, pcs, seconds):
        "Keep the figures of one set of cells"
        if isinstance(figures, str): self.say(name, 'NOT JUDGED', figures); return
        self.row(name=name, judged=figures, judge_seconds=round(seconds, 1))
        short = ' '.join(f'{k} {v:.3f}' for k,v in figures.items() if k[:4] in ('auc_','mmd2') and not k.endswith('sd'))
        self.say(name, figures['see'], figures['trees'], short, f'({seconds:.0f} s)')
        if figures['trees']==self.a.trees and name in self.shared.get('keep pcs', ()):
            for k,v in pcs.items(): self.keep(f'{name}/pcs_{k}', v)

# ---------------------------------------------------------------- steps on the device

class Repeat:
    "A function without arguments, to be called many times; a CUDA graph where there is a GPU"
    def __init__(self, f, gen, warm=3):
        for _ in range(warm): f()
        self.f,self.graph = f,None
        if gen.device.type=='cpu': return
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(gen)
        graph.capture_begin(capture_error_mode='thread_local')
        try: f()
        finally: graph.capture_end()
        self.graph = graph
    def __call__(self, n):
        for _ in range(n): self.graph.replay() if self.graph else self.f()

class Drop(nn.Module):
    "Dropout that draws from a generator of its own"
    def __init__(self, p, gen): super().__init__(); self.p,self.gen = p,gen
    def forward(self, x):
        if not self.training: return x
        return x*torch.empty_like(x).bernoulli_(1-self.p, generator=self.gen)/(1-self.p)

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
    params = list(net.parameters()) if isinstance(net, nn.Module) else net
    cuda = params[0].is_cuda
    return params,kind(params, lr=torch.tensor(lr, device=params[0].device) if cuda else lr,
        fused=True, **(dict(capturable=True) if cuda else {}), **kw)

def downhill(params, opt, loss):
    "One step; only `params` move"
    for p,g in zip(params, torch.autograd.grad(loss, params)): p.grad = g
    opt.step()

def fall(opt, factor):
    "Multiply the learning rate, on the device"
    for g in opt.param_groups:
        if torch.is_tensor(g['lr']): g['lr'].mul_(factor)
        else: g['lr'] *= factor

def steps(ctx, repeat, n, chunk=50):
    "Queue `n` calls, some at a time, until training has to stop; returns how many"
    done = 0
    while done<n and not ctx.over():
        repeat(k := min(chunk, n-done))
        done += k
        yield
    yield 'drain'
    return done

def randint(n, size, gen): return torch.randint(n, (size,), generator=gen, device=gen.device)
def randn(*shape, gen): return torch.randn(*shape, generator=gen, device=gen.device)

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

def autoencoder(ctx, data, scale, n_latent, seed, oracles=()):
    "Train an autoencoder to convergence; it is kept for the jobs that ask for it"
    x,gen,t = ctx.x[data][scale],generator(ctx, 'ae', data, scale, n_latent, seed),time.time()
    unit = x.square().mean().sqrt()
    ae = TwoLayers(x.shape[1], n_latent, (x.mean(0)/unit).cpu()).to(ctx.dev)
    params,opt = optimiser(torch.optim.AdamW, ae, 1e-3)
    n = ctx.a.ae_steps
    def step():
        b = x[randint(len(x), 256, gen)]/unit
        downhill(params, opt, F.mse_loss(ae(b), b))
        fall(opt, 0.01**(1/n))
    repeat,done,name = Repeat(step, gen),3,f'{data}-ae-{scale}-{n_latent}-{seed}'
    for goal in (*(o for o in oracles if o<n), n):
        done += yield from steps(ctx, repeat, goal-done)
        with torch.no_grad():
            rows = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(x))[:N])).to(ctx.dev)
            back = ae(x[rows]/unit)*unit
            r2 = 1-((back-x[rows])**2).sum().item()/((x[rows]-x.mean(0))**2).sum().item()
        meta = dict(system='autoencoder alone', n_latent=n_latent, seed=seed, steps=done,
            seconds=round(time.time()-t, 1), r2=r2)
        ctx.emit(f'{name}-{done}', back, scale, data, 'genes' if seed==0 and n_latent in (128,256) else seed==0, **meta)
        if ctx.over(): break
    ctx.say(name, f'{done} steps, {1e3*(time.time()-t)/done:.2f} ms a step, r2 {r2:.3f}')
    with torch.no_grad(): z = torch.cat([ae.encoder(b/unit) for b in x.split(1000)])
    mean,std = z.mean(0),z.std(0)+1e-6
    if seed==0 and n_latent==128:
        for k,v in dict(ae.decoder.state_dict(), unit=unit, mean=mean, std=std).items():
            ctx.keep(f'{name}/{k}', v.cpu().numpy().astype(np.float16 if v.ndim==2 else np.float32))
    if ctx.dev.type=='cuda': torch.cuda.current_stream().synchronize() # Other streams will use it
    ctx.shared[data,scale,n_latent,seed] = SimpleNamespace(ae=ae, unit=unit, mean=mean, std=std, z=(z-mean)/std, r2=r2)

def shared_autoencoder(ctx, data, scale, n_latent, seed):
    "The autoencoder of a reading: trained here, or by another lane while this one waits"
    key = data,scale,n_latent,seed
    if key not in ctx.shared:
        ctx.shared[key] = None
        yield from autoencoder(ctx, *key, (2000,) if seed==0 else ())
    while ctx.shared[key] is None and time.time()<ctx.hard: yield 'wait'
    if ctx.shared[key] is None: raise RuntimeError(f'no autoencoder for {key}')
    return ctx.shared[key]

def schedule(ctx):
    "The tables that training and sampling need, on the device"
    s = NoiseSchedule(linear_betas(T))
    tables = dict(signal=s.alphas_cumprod.sqrt(), spread=(1-s.alphas_cumprod).sqrt(),
        pull=s.betas/(1-s.alphas_cumprod).sqrt(), grow=s.alphas.rsqrt(),
                  posterior=((1-s.alphas_cumprod_prev)/(1-s.alphas_cumprod)*s.betas).sqrt(), beta=s.betas.sqrt())
    tables['beta'][0] = 0.
    return SimpleNamespace(**{k: v.float().to(ctx.dev) for k,v in tables.items()})

class Chain:
    "Ancestral sampling, Algorithm 2, with its state on the device"
    def __init__(self, ctx, model, n, n_latent, gen):
        self.ctx,self.gen,self.s = ctx,gen,schedule(ctx)
        self.z,self.t = torch.zeros(n, n_latent, device=ctx.dev),torch.full((1,), T-1, device=ctx.dev)
        self.label,self.sigma = torch.zeros(n, dtype=torch.long, device=ctx.dev),self.s.posterior.clone()
        def step():
            with torch.no_grad():
                eps = model(self.z, self.t.expand(n), self.label)
                mean = (self.z-self.s.pull[self.t]*eps)*self.s.grow[self.t]
                self.z.copy_(mean+self.sigma[self.t]*randn(n, n_latent, gen=gen))
                self.t.sub_(1)
        self.repeat = Repeat(step, gen)
    def run(self, label, variance='posterior', chunk=100):
        "Latents for labels, by `yield from`"
        self.label.copy_(torch.from_numpy(np.asarray(label)))
        self.sigma.copy_(getattr(self.s, variance))
        self.z.copy_(randn(*self.z.shape, gen=self.gen))
        self.t.fill_(T-1)
        for i in range(0, self.ctx.sample_steps, chunk):
            self.repeat(min(chunk, self.ctx.sample_steps-i))
            yield
        yield 'drain'
        return self.z.clone()

def paper(ctx, data, scale, n_latent, backbone, labels, seed):
    "The paper's model: constant rate, batches of 128, no average of weights, the whole chain"
    ae = yield from shared_autoencoder(ctx, data, scale, n_latent, seed)
    gen,s,t = generator(ctx, 'paper', data, scale, n_latent, backbone, labels, seed),schedule(ctx),time.time()
    label,K = ctx.label[data],len(CELLS[data].kinds)
    unet = UNet(n_latent, tuple(ctx.a.widths), 128, 0.1, backbone, bends=0).to(ctx.dev)
    if backbone=='mlp': own_dropout(unet, gen) # One lane has convolutions: it may use torch's own stream
    net = unet
    if labels:
        x = scaled(CELLS[data].train)
        net = Denoiser(unet, cluster_means(x.log1p() if scale=='log' else x,
            CELLS[data].label, K, 1).to(ctx.dev), 'mean').to(ctx.dev)
    model = net if labels else (lambda z, t, label: net(z, t))
    params,opt = optimiser(torch.optim.AdamW, net, 1e-3)
    average = torch.ones((), device=ctx.dev)
    def step():
        i,at,noise = randint(len(label), 128, gen),randint(T, 128, gen),randn(128, n_latent, gen=gen)
        zt = s.signal[at][:,None]*ae.z[i]+s.spread[at][:,None]*noise
        loss = F.mse_loss(model(zt, at, global_slot(label[i], K, 0.2)), noise)
        downhill(params, opt, loss)
        average.lerp_(loss.detach(), 0.01)
    net.train()
    repeat = Repeat(step, gen)
    done = 3+(yield from steps(ctx, repeat, ctx.a.paper_steps-3, 10 if backbone=='conv' else 50))
    name,took = f'{data}-{scale}-{n_latent}-{backbone}-{"pre" if labels else "plain"}-{seed}',time.time()-t
    ctx.say(name, f'{done} steps, {1e3*took/done:.2f} ms a step, loss {average.item():.3f}')
    del repeat
    net.eval()
    meta = dict(system='paper', n_latent=n_latent, backbone=backbone, labels=labels, seed=seed, steps=done,
        seconds=round(took, 1), loss=average.item(), ae_r2=ae.r2)
    yield from made_by(ctx, Chain(ctx, model, N, n_latent, gen), ae, name, data, scale, meta)

def made_by(ctx, chain, ae, name, data, scale, meta):
    "Cells of one model: labels dealt or left open, both variances, and what a scorer keeps"
    rng,K,seed = np.random.default_rng(meta['seed']),len(CELLS[data].kinds),meta['seed']
    want,open_ = dealt(CELLS[data].label, N, rng),np.full(N, K)
    def decode(z):
        with torch.no_grad(): return ae.ae.decoder(z*ae.std+ae.mean)*ae.unit
    again = 'genes' if seed==0 and meta['n_latent']==128 else seed==0 or meta['n_latent']==128
    todo = [('w0',want,'posterior'),('w-1',open_,'posterior'),('w0-beta',want,'beta')]
    if not meta['labels']: todo = [('plain',np.zeros(N),'posterior'),('plain-beta',np.zeros(N),'beta')]
    for how,label,variance in todo:
        if time.time()>ctx.hard or (variance=='beta' and seed>0 and meta['backbone']=='conv'): continue
        t = time.time()
        z = yield from chain.run(label.astype(np.int64), variance)
        if seed==0 and meta['n_latent']==128: ctx.keep(f'{name}-{how}/z', z.cpu().numpy().astype(np.float16))
        elif how in ('w0','plain'): ctx.shared.setdefault('keep pcs', set()).add(f'{name}-{how}')
        ctx.emit(f'{name}-{how}', decode(z), scale, data, again if variance=='posterior' else False,
            **meta, how=how, sample_seconds=round(time.time()-t, 1))
    if meta['labels'] and meta['backbone']=='mlp' and time.time()<ctx.hard:
        yield from kept_by_scorer(ctx, chain, decode, want, name, data, scale, meta)

def kept_by_scorer(ctx, chain, decode, want, name, data, scale, meta):
    "Post-guidance: a scorer of logged values, trained on training cells; the best 80 % of each label"
    gen,rng,rounds = chain.gen,np.random.default_rng(meta['seed']+1),[]
    for _ in range(3): rounds.append((yield from chain.run(dealt(CELLS[data].label, N, rng))))
    logged = lambda z: decode(z) if scale=='log' else decode(z).log1p()
    fake,real = torch.cat([logged(z) for z in rounds]),ctx.x[data]['log']
    net = own_dropout(Scorer(real.shape[1]), gen).to(ctx.dev)
    params,opt = optimiser(torch.optim.AdamW, net, 1e-3)
    truth = torch.arange(128, device=ctx.dev)//64
    def step():
        some = torch.cat([fake[randint(len(fake), 64, gen)],real[randint(len(real), 64, gen)]])
        downhill(params, opt, F.cross_entropy(net(some), truth))
    net.train()
    done = 3+(yield from steps(ctx, Repeat(step, gen), ctx.a.paper_steps//6))
    net.eval()
    yield from best_of(ctx, chain, decode, logged, net, want, name, data, scale, dict(meta, scorer_steps=done))

def best_of(ctx, chain, decode, logged, net, want, name, data, scale, meta):
    "Candidates in two rounds, and the best of each label"
    asked = np.sort(candidates(want, 0.8))
    first = yield from chain.run(np.resize(asked[::2], N))
    second = yield from chain.run(np.resize(asked[1::2], N))
    z,label = torch.cat([first[:len(asked[::2])],second[:len(asked[1::2])]]),np.concatenate([asked[::2],asked[1::2]])
    with torch.no_grad(): score = net(logged(z)).softmax(1)[:,1].cpu().numpy()
    best = keep_best(score, label, {k: int(n) for k,n in enumerate(np.bincount(want)) if n})
    z = z[torch.from_numpy(best).to(z.device)]
    if meta['seed']==0 and meta['n_latent']==128: ctx.keep(f'{name}-w0-post/z', z.cpu().numpy().astype(np.float16))
    ctx.emit(f'{name}-w0-post', decode(z), scale, data, True, **meta, how='w0, scorer keeps 80 %')

# ---------------------------------------------------------------- others

def gan(ctx, data, conditional, seed, variant, milestones):
    "scGAN or cscGAN at published widths: `published` rates and sums, or those `adapted` to short runs"
    lr,total,momentum,life = dict(published=(1e-4,20_000.,0.001,1_000_000), adapted=(5e-4,100.,0.01,100_000))[variant]
    gen,t,x = generator(ctx, 'gan', data, conditional, seed, variant),time.time(),ctx.x[data]['raw']
    label = ctx.label[data] if conditional else torch.zeros_like(ctx.label[data])
    K,n = int(label.max())+1,len(label)
    G = Generator(x.shape[1], 128, [256,512,1024], K, momentum, total).to(ctx.dev)
    D = Critic(x.shape[1], [1024,512,256], K).to(ctx.dev)
    (pd,od),(pg,og) = (optimiser(torch.optim.Adam, m, lr, betas=(0.5,0.9), amsgrad=True) for m in (D,G))
    def critic():
        i = randint(n, 128, gen)
        real,kind = x[i]*(total/TOTAL),label[i]
        with torch.no_grad(): fake = G(randn(128, 128, gen=gen), kind)
        u = torch.rand(128, 1, generator=gen, device=ctx.dev)
        made,seen = D(torch.cat([fake,real]), torch.cat([kind,kind])).chunk(2)
        downhill(pd, od, (made-seen).mean()+10*gradient_penalty(lambda v: D(v, kind), real, fake, u))
    def step():
        for _ in range(5): critic()
        kind = label[randint(n, 128, gen)]
        downhill(pg, og, -D(G(randn(128, 128, gen=gen), kind), kind).mean())
        for o in (od,og): fall(o, 0.1**(1/life))
    G.train()
    repeat,done,name = Repeat(step, gen),3,f'{data}-{"cscgan" if conditional else "scgan"}-{variant}-{seed}'
    kind = torch.from_numpy(dealt(label.cpu().numpy(), N, np.random.default_rng(seed))).to(ctx.dev)
    for goal in milestones:
        done += yield from steps(ctx, repeat, goal-done, 15)
        G.eval()
        with torch.no_grad(): native = G(randn(N, 128, gen=gen), kind)*(TOTAL/total)
        G.train()
        last = ctx.over() or goal==milestones[-1]
        if last: ctx.shared.setdefault('keep pcs', set()).add(f'{name}-{done}')
        meta = dict(system='cscGAN' if conditional else 'scGAN', variant=variant, seed=seed, steps=done,
            published_steps=1_000_000, seconds=round(time.time()-t, 1))
        ctx.emit(f'{name}-{done}', native, 'raw', data, 'genes' if last else False, 0 if last else 2, **meta)
        ctx.say(name, f'{done} steps, {1e3*(time.time()-t)/done:.2f} ms a step')
        if ctx.over(): return

def activa(ctx, data, scale, seed, epochs):
    "ACTIVA by epochs of its script, at published widths and rate"
    gen,t,x,label = generator(ctx, 'activa', data, scale, seed),time.time(),ctx.x[data][scale],ctx.label[data]
    (n,G),K = x.shape,len(CELLS[data].kinds)
    layers = [l for i,o in ((G,100),(100,50),(50,25)) for l in (nn.Linear(i, o),nn.ReLU())]
    judge_,net = nn.Sequential(*layers, nn.Linear(25, K)).to(ctx.dev),IntroVAE(G, 128, [1024,512,256]).to(ctx.dev)
    params,opt = optimiser(torch.optim.AdamW, judge_, 1e-3)
    def learn_kinds(): i = randint(n, 128, gen); downhill(params, opt, F.cross_entropy(judge_(x[i]), label[i]))
    yield from steps(ctx, Repeat(learn_kinds, gen), ctx.a.paper_steps//10)
    (pe,oe),(pd,od) = (optimiser(torch.optim.Adam, m, 2e-4) for m in (net.encoder,net.decoder))
    def both(loss):
        for p,g in zip([*pe,*pd], torch.autograd.grad(loss, [*pe,*pd])): p.grad = g
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
    for goal,step in ((10,warm), *((e,adversarial) for e in epochs)):
        if repeat is None or step is not was: repeat,was = Repeat(step, gen),step; done += 3
        done += yield from steps(ctx, repeat, goal*per-done)
        if step is warm: continue
        net.eval()
        with torch.no_grad(): native = net.decoder(randn(N, 128, gen=gen))
        net.train()
        last = ctx.over() or goal==epochs[-1]
        if last and seed==0: ctx.shared.setdefault('keep pcs', set()).add(f'{name}-{done}')
        meta = dict(system='ACTIVA', variant=scale, seed=seed, steps=done, epochs=round(done/per, 1),
            published_epochs=500, seconds=round(time.time()-t, 1))
        ctx.emit(f'{name}-{done}', native, scale, data, ('genes' if seed==0 else True) if last else False, 2, **meta)
        if ctx.over(): break
    ctx.say(name, f'{done} steps, {1e3*(time.time()-t)/max(done, 1):.2f} ms a step')

def latent(ctx, data, seed, milestones):
    "A model after scDiffusion at published widths, on logged values, without labels"
    gen,t,x,s = generator(ctx, 'latent', data, seed),time.time(),ctx.x[data]['log'],schedule(ctx)
    n,G = x.shape
    ae,net = LatentAE(G, 128, [1024,1024,1024]).to(ctx.dev),SkipMLP(128, [512,512,256,128], 512).to(ctx.dev)
    pa,oa = optimiser(torch.optim.AdamW, ae, 5e-4)
    def rebuild(): b = x[randint(n, 128, gen)]; downhill(pa, oa, F.mse_loss(ae(b), b))
    ae.train()
    ae_done = 3+(yield from steps(ctx, Repeat(rebuild, gen), 2*ctx.a.ae_steps))
    ae.eval()
    with torch.no_grad(): z0 = torch.cat([ae.encode(b) for b in x.split(1000)])
    pn,on = optimiser(torch.optim.AdamW, net, 1e-4, weight_decay=1e-4)
    def step():
        i,at,noise = randint(n, 128, gen),randint(T, 128, gen),randn(128, 128, gen=gen)
        downhill(pn, on, F.mse_loss(net(s.signal[at][:,None]*z0[i]+s.spread[at][:,None]*noise, at), noise))
    repeat,done,name = Repeat(step, gen),3,f'{data}-latent-{seed}'
    chain = Chain(ctx, lambda z, t, label: net(z, t), N, 128, gen)
    for goal in milestones:
        done += yield from steps(ctx, repeat, goal-done)
        took = round(time.time()-t, 1)
        z = yield from chain.run(np.zeros(N, int))
        with torch.no_grad(): native = ae.decoder(z).clamp(0, float(np.log1p(TOTAL)))
        last = ctx.over() or goal==milestones[-1]
        if last: ctx.shared.setdefault('keep pcs', set()).add(f'{name}-{done}')
        meta = dict(system='latent diffusion', seed=seed, steps=done, published_steps=600_000,
            ae_steps=ae_done, seconds=took)
        ctx.emit(f'{name}-{done}', native, 'log', data, 'genes' if last else False, 0 if last else 2, **meta)
        ctx.say(name, f'{done} steps, {1e3*took/done:.2f} ms a step with the autoencoder')
        if ctx.over(): return

# ---------------------------------------------------------------- the plan

def plan(a):
    "Queues of jobs, how many lanes take from each, their priority, and whether they wait for the first queue"
    blood,brain = SETS
    curve = [2000,5000,10_000,20_000,50_000,100_000,200_000,400_000,700_000,1_000_000]
    order = [(128,True,0),(128,False,0),(128,True,1),(256,True,0),(128,True,2),(128,False,1),(256,True,1)]
    mlp = [(paper,d,s,z,'mlp',l,seed) for z,l,seed in order for s in ('raw','log') for d in SETS]
    mlp += [(autoencoder,d,s,z,0) for z in (24,64,512) for s in ('raw','log') for d in SETS]
    conv = [(paper,d,s,128,'conv',True,0) for s in ('raw','log') for d in SETS]
    kin = [[(activa,d,s,seed,(20,50,100,200,500)) for seed in (0,1) for s in ('raw','log')] for d in SETS]
    lat = [[(latent,d,0,(20_000,50_000,100_000,200_000,400_000,600_000))] for d in SETS]
    gans = [[(gan,d,c,0,v,curve)]
        for d,c,v in ((brain,False,'published'),(brain,True,'published'),(blood,False,'published'))]
    late = [[(gan,d,c,0,v,curve)] for d,c,v in ((brain,False,'adapted'),(blood,True,'published'))]
    return [(mlp,a.mlp_lanes,-1,False), (conv,a.conv_lanes,0,False), *((j,1,0,False) for j in gans),
        *((j,1,0,True) for j in kin+lat+late)]

def smoke(a):
    "A little of everything, one after another"
    blood,brain = SETS
    jobs = [(paper,d,'raw',128,b,l,0) for b,l in (('mlp',True),('mlp',False),('conv',True)) for d in SETS]
    jobs += [(gan,d,c,0,'published',[a.paper_steps]) for c in (False,True) for d in SETS]
    jobs += [(activa,d,'raw',0,(12,)) for d in SETS]+[(latent,d,0,(a.paper_steps,)) for d in SETS]
    return [(jobs,1,0,False)]

class Lane:
    "A stream and the job on it"
    def __init__(self, ctx, jobs, priority, after):
        self.ctx,self.jobs,self.job,self.asked,self.events,self.after = ctx,jobs,None,None,deque(),after
        self.stream = torch.cuda.Stream(priority=priority) if ctx.dev.type=='cuda' else None
    def ready(self):
        if self.after: return False
        while self.events and self.events[0].query(): self.events.popleft()
        return len(self.events)<(1 if self.asked in ('drain','wait') else 3)
    def advance(self):
        "Queue some more work; False where there is none"
        if self.job is None:
            if not self.jobs or self.ctx.over(): return False
            self.what = self.jobs.popleft()
            self.job = self.what[0](self.ctx, *self.what[1:])
        try: self.asked = next(self.job)
        except StopIteration: self.job = None
        except Exception:
            self.job = None
            self.ctx.say('FAILED', self.what[0].__name__, self.what[1:], traceback.format_exc())
        return self.asked!='wait'
    def go(self):
        "`advance` on the lane's stream"
        if self.stream is None: return self.advance()
        with torch.cuda.stream(self.stream):
            moved = self.advance()
            if moved: self.events.append(torch.cuda.Event()); self.events[-1].record()
        return moved

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

def make(a):
    "Train, sample and judge until the deadline"
    from multiprocessing import get_context
    Path(a.out).mkdir(parents=True, exist_ok=True)
    for d in SETS: CELLS[d] = read_cells(a.cells, d, a.genes)
    pool = get_context('fork').Pool(a.workers) # Before anything touches the GPU
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(1 if a.device=='cuda' else 2)
    ctx = Context(a, pool)
    ctx.row(**provenance(a, ctx))
    if not a.smoke: start_ladder(ctx)
    if a.device=='cuda': torch.cuda.synchronize()
    if a.device=='cuda': faster_convolution(ctx)
    lanes = []
    for jobs,n,priority,late in smoke(a) if a.smoke else plan(a):
        queue = deque(j for j in jobs if not a.only or j[0].__name__ in a.only.split(','))
        lanes += [Lane(ctx, queue, priority, late) for _ in range(n)]
    flushed = time.time()
    ctx.say('ready', len(lanes), 'lanes', provenance(a, ctx)['device'])
    while time.time()<ctx.end-4:
        moved = [l.go() for l in lanes if l.ready()]
        ctx.serve()
        if lanes[0].after is False and not any(j[0] is paper for j in lanes[0].jobs):
            for l in lanes: l.after = False
        if time.time()-flushed>20: ctx.flush(); flushed = time.time()
        if not any(moved): time.sleep(0.001)
        if not any(l.job or (l.jobs and not ctx.over()) for l in lanes) and not ctx.running and not ctx.waiting: break
    ctx.flush()
    ctx.say('ended;', len(ctx.waiting)+len(ctx.running), 'judges were not done;',
        'memory', torch.cuda.max_memory_allocated()/2**30 if a.device=='cuda' else '')
    shutil.rmtree(ctx.tmp, ignore_errors=True)
    sys.stdout.flush()
    pool.terminate()
    os._exit(0)

def start_ladder(ctx):
    "The systems that need no GPU, made by the workers and judged like the others"
    def made(data, row, seed):
        path = str(ctx.tmp/f'{data}-{row}-{seed}.npy')
        def ended(seconds): ctx.shared.setdefault('made', []).append((data,row,seed,path,seconds))
        return ctx.pool.apply_async(ladder, (data,row,seed,path), callback=ended,
            error_callback=lambda e: ctx.say('FAILED', data, row, e))
    for data in SETS:
        for row in LADDER: made(data, row, 0)
    serve = ctx.serve
    def also():
        while ctx.shared.get('made'):
            data,row,seed,path,seconds = ctx.shared['made'].pop()
            ctx.judge(f'{data}-{row}-{seed}', path, 'raw', data, 'genes', 1,
                dict(system=row, seed=seed, seconds=round(seconds, 1)))
        serve()
    ctx.serve = also

# ---------------------------------------------------------------- the default model: GPU against CPU

def speed(a):
    "Seconds of the default model by stage, and how many of them are draws of counts"
    from anndata import AnnData
    import pandas as pd
    from scld.autoencoder import Autoencoder
    from scld.model import SCLD
    torch.set_num_threads(a.threads)
    took = {}
    def timed(cls, name):
        f = getattr(cls, name)
        def g(*args, **kw):
            if a.device=='cuda': torch.cuda.synchronize()
            t = time.time()
            out = f(*args, **kw)
            if a.device=='cuda': torch.cuda.synchronize()
            took[name.strip('_')] = took.get(name.strip('_'), 0)+time.time()-t
            return out
        setattr(cls, name, g)
    for name in ('_fit_autoencoder','_fit_diffusion','_fit_scorer'): timed(SCLD, name)
    timed(Autoencoder, 'draw')
    for d in SETS:
        c = read_cells(a.cells, d, a.genes)
        obs = pd.DataFrame(dict(cell_type=pd.Categorical.from_codes(c.label, c.kinds)),
            index=[f'c{i}' for i in range(len(c.label))])
        model = SCLD(AnnData(c.train, obs=obs, var=pd.DataFrame(index=c.genes)), labels='cell_type')
        took.clear()
        model.train(steps=a.speed_steps, device=a.device, seed=0, progress=False)
        trained = dict(took)
        took.clear()
        t = time.time()
        model.sample(N, seed=0)
        row = dict(speed=d, device=torch.cuda.get_device_name() if a.device=='cuda' else 'cpu', threads=a.threads,
            steps=a.speed_steps, train=trained,
                   sample_seconds=time.time()-t, sample_draw=took.get('draw'), n=N, torch=torch.__version__,
                       autoencoder_steps=int((model.history.stage=='autoencoder').sum()))
        with open(Path(a.out)/f'speed-{a.device}.jsonl', 'a') as f: f.write(json.dumps(row)+'\n')
        print(row, flush=True)

# ---------------------------------------------------------------- at home

def judge(a):
    "Keep the rows of a run, and judge the arrays that came back once more, with more trees"
    for d in SETS: CELLS[d] = read_cells(a.cells, d)
    out,arrays = Path(a.rows),{}
    out.mkdir(parents=True, exist_ok=True)
    keep_rows(a, out)
    for f in sorted(Path(a.out).glob('pack*.npz')): arrays |= {k: v for k,v in np.load(f).items()}
    (out/'silent.json').write_text(json.dumps(silent(arrays), indent=1)+'\n')
    known = json.loads((out/'again.json').read_text()) if (out/'again.json').exists() else {}
    for name,see in again(arrays):
        if f'{name}/{see}' in known or a.only not in f'{name}/{see}': continue
        t = time.time()
        known[f'{name}/{see}'] = short(judged_again(arrays, name, see, a.more if see=='pcs' else a.trees))
        (out/'again.json').write_text(json.dumps(known, indent=1)+'\n')
        print(name, see, known[f'{name}/{see}'], f'{time.time()-t:.0f} s', flush=True)
    for d,scale,k in [(d,s,k) for k in (128,256) for s in ('raw','log') for d in SETS[::-1]]:
        if (name := f'{d}-linear-{scale}-{k}/pcs') in known or a.only not in name: continue
        known[name] = short(judge_values(linear(d, scale, k), scale, d, a.more)[0])
        (out/'again.json').write_text(json.dumps(known, indent=1)+'\n')
        print(name, known[name], flush=True)

def principal(data, scale, k):
    "Mean and first k principal axes of the training cells"
    from sklearn.utils.extmath import randomized_svd
    x = scaled(CELLS[data].train)
    x = (x.log1p() if scale=='log' else x).toarray().astype(np.float32)
    return x.mean(0),randomized_svd(x-x.mean(0), k, n_iter=4, random_state=0)[2]

def linear(data, scale, k):
    "Training cells through the best linear autoencoder of k latents, values below zero set to zero"
    mean,axes = principal(data, scale, k)
    x = scaled(CELLS[data].train)
    x = (x.log1p() if scale=='log' else x)[np.sort(np.random.default_rng(0).permutation(x.shape[0])[:N])].toarray()
    return np.maximum((x-mean)@axes.T@axes+mean, 0)

def keep_rows(a, out):
    "The lines of a run as two files: what the figures hang on, and a row for each set of cells"
    lines = [json.loads(l) for l in (Path(a.out)/'rows.jsonl').read_text().splitlines()]
    rows = {r['name']: {k: v for k,v in r.items() if k not in ('name','made')}|dict(judged=[])
        for r in lines if r.get('made')}
    for r in lines:
        if 'judged' in r: rows[r['name']]['judged'].append(r['judged'])
    run = {k: v for k,v in lines[0].items() if k!='provenance'}
    run['settings'] = {k: v for k,v in run['settings'].items() if k not in ('cells','out','rows','only','stage')}
    trained = {k: r for k,r in rows.items() if r.get('steps', 99)>3} # The steps before a graph is made are three
    lost = dict(not_trained=[k for k in rows if k not in trained],
        not_judged=[k for k,r in trained.items() if not r['judged']])
    (out/'run.json').write_text(json.dumps(run|lost, indent=1)+'\n')
    text = ',\n'.join(f'{json.dumps(k)}: {json.dumps(short(r))}' for k,r in trained.items() if r['judged'])
    (out/'rows.json').write_text('{\n'+text+'\n}\n')

def short(v):
    "The same with four digits after the point"
    if isinstance(v, dict): return {k: short(x) for k,x in v.items()}
    return [short(x) for x in v] if isinstance(v, list) else round(v, 4) if isinstance(v, float) else v

def again(arrays):
    "What can be judged again: latents whose decoder came back, and components"
    z = [k[:-2] for k in arrays if k.endswith('/z')]
    first = sorted(z, key=lambda k: ('conv' not in k, 'beta' in k, 'w-1' in k))
    pcs = [k[:-8] for k in arrays if k.endswith('/pcs_raw') and 'latent' not in k]
    genes = [k for k in first if k.endswith('mlp-pre-0-w0')]
    return [(k,'pcs') for k in first+pcs]+[(k,'genes') for k in genes]

def judged_again(arrays, name, see, trees):
    "Figures of one set of cells"
    data,scale,n_latent,*_ = name.split('-')
    if f'{name}/z' in arrays:
        native = decoded(arrays, f'{data}-ae-{scale}-{n_latent}-0', arrays[f'{name}/z'])
        return judge_values(native, scale, data, trees, see)[0]
    out = dict(see=see, trees=trees, n=N)
    for view in ('raw','log'):
        z = arrays[f'{name}/pcs_{view}'].astype(np.float64)
        auc,n = rf_auc(z[:-N], z[-N:], 'genes-5fold', trees, 0),len(z)-N
        out |= {f'mmd2_e3_{view}': 1e3*float(mmd2_sides(z, sides(n, N))[0]),
            f'auc_{view}': float(auc.mean()), f'auc_{view}_sd': float(auc.std())}
    return out

def silent(arrays):
    "Genes that no made cell of seed 0 has, and what they are worth in test cells"
    out = {}
    for name in (k[:-2] for k in arrays if k.endswith('pre-0-w0/z')):
        data,scale,n_latent,*_ = name.split('-')
        made = decoded(arrays, f'{data}-ae-{scale}-{n_latent}-0', arrays[f'{name}/z'])
        x = scaled(CELLS[data].test)
        x = (x.log1p() if scale=='log' else x).toarray()
        never = made.max(0)==0
        share = dict(variance=x.var(0)[never].sum()/x.var(0).sum(), sum=x[:,never].sum()/x.sum())
        zeros = dict(zeros_made=(made==0).mean(), zeros_real=(x==0).mean())
        total = views(made, scale)['raw'].sum(1).mean()
        figures = short({k: float(v) for k,v in dict(share, **zeros, total=total).items()})
        out[name] = dict(figures, silent=int(never.sum()), genes=len(never))
    return out

class Home(Context):
    "What `paper` needs of a run, on a CPU, with the best linear autoencoder in place of a trained one"
    def __init__(self, a, known):
        self.a,self.dev,self.t0,self.sample_steps = a,torch.device('cpu'),time.time(),a.chain
        self.shared,self.known = {},known
        self.hard,self.x,self.label = float('inf'),{},{d: torch.from_numpy(c.label) for d,c in CELLS.items()}
    def over(self): return False
    def keep(self, *_): pass
    def emit(self, name, native, scale, data, *_, **meta):
        out = short(judge_values(native.numpy(), scale, data, self.a.trees)[0]|meta)
        self.known[name] = out
        (Path(self.a.rows)/'linear.json').write_text(json.dumps(self.known, indent=1)+'\n')
        self.say(name, out)

def home(a):
    "The paper's diffusion in the latents of the best linear autoencoder, here"
    data,scale,k = a.only.split(',')
    CELLS[data] = read_cells(a.cells, data)
    home = Home(a, {})
    mean,axes = principal(data, scale, int(k))
    x = scaled(CELLS[data].train)
    x = (x.log1p() if scale=='log' else x).toarray().astype(np.float32)
    home.x[data] = dict(log=torch.from_numpy(x if scale=='log' else np.log1p(x)))
    z,back = torch.from_numpy((x-mean)@axes.T),nn.Sequential(nn.Linear(int(k), x.shape[1]), nn.ReLU())
    with torch.no_grad():
        back[0].weight.copy_(torch.from_numpy(axes.T.copy()))
        back[0].bias.copy_(torch.from_numpy(mean))
    std = z.std(0)
    r2 = float(z.square().sum()/np.square(x-mean).sum())
    ae = SimpleNamespace(decoder=back)
    home.shared[data,scale,int(k),0] = SimpleNamespace(ae=ae, unit=1., mean=0., std=std, z=z/std, r2=r2)
    torch.set_num_threads(1)
    for _ in paper(home, data, scale, int(k), 'mlp', True, 0): pass

def decoded(arrays, name, z):
    "Values of latents, by the decoder that came back with them"
    p = {k.split('/')[1]: v.astype(np.float32) for k,v in arrays.items() if k.startswith(name+'/')}
    h = np.maximum((z.astype(np.float32)*p['std']+p['mean'])@p['0.weight'].T+p['0.bias'], 0)
    return np.maximum(h@p['2.weight'].T+p['2.bias'], 0)*p['unit']

def main():
    "One stage"
    p = argparse.ArgumentParser(description='One run on a borrowed GPU')
    p.add_argument('stage', choices=['prepare','make','speed','judge','home'])
    p.add_argument('--cells', default='.card', help='folder made by `prepare`')
    p.add_argument('--out', default='out')
    p.add_argument('--rows', default='nbs/results/card')
    p.add_argument('--device', default='cuda')
    p.add_argument('--only', default='')
    p.add_argument('--smoke', action='store_true')
    for k,v in dict(deadline=500, tail=75, workers=12, trees=300, more=1000,
        paper_steps=20_000, ae_steps=10_000, chain=T, mlp_lanes=8, conv_lanes=1,
                    threads=12, speed_steps=1200, genes=0).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--widths', type=int, nargs='+', default=[256,192,128], help='of the U-Net')
    a = p.parse_args()
    dict(prepare=prepare, make=make, speed=speed, judge=judge, home=home)[a.stage](a)

if __name__=='__main__': main()
