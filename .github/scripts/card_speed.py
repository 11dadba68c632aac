"""The default model on a device: seconds by stage, kernels and waits of a step, quality; a line of JSON for each set

    python card_speed.py --cells FOLDER --out OUT --device cuda --steps 600 --name new
    python card_speed.py ... --steps 0 --judge        the default number of steps, and a forest on the test cells

`--cells` is the folder that `card.py prepare` makes.
"""
import argparse,json,os,time,warnings
from pathlib import Path
for k in ('OMP_NUM_THREADS','MKL_NUM_THREADS'): os.environ.setdefault(k, '4')
import numpy as np, pandas as pd, torch
from anndata import AnnData
from card import SETS,read_cells
import scld
from scld.autoencoder import Autoencoder
from scld.model import SCLD

N = 1500 # Cells that are judged
STAGES = '_fit_autoencoder','_calibrate','_fit_labeller','_fit_diffusion','_fit_scorer','_try_labels'
took = {} # Seconds by method

def wait(cuda):
    "Let the device finish"
    if cuda and not torch.cuda.is_current_stream_capturing(): torch.cuda.synchronize()

def timed(cls, name, cuda):
    "Add up the seconds of a method"
    f = getattr(cls, name)
    def g(*args, **kw):
        wait(cuda)
        t = time.time()
        out = f(*args, **kw)
        wait(cuda)
        took[name.strip('_')] = took.get(name.strip('_'), 0)+time.time()-t
        return out
    setattr(cls, name, g)

def cells_of(c):
    "Training cells as an AnnData"
    obs = pd.DataFrame(dict(cell_type=pd.Categorical.from_codes(c.label, c.kinds)))
    return AnnData(c.train, obs=obs.set_index(obs.index.astype(str)), var=pd.DataFrame(index=c.genes))

def kernels(model, steps=60):
    "What a short training asks of the device: launches, copies and waits, and milliseconds that it works"
    from torch.profiler import ProfilerActivity,profile
    with profile(activities=[ProfilerActivity.CPU,ProfilerActivity.CUDA]) as prof:
        model._fit_diffusion(steps, batch_size=256, progress=False)
    found = list(prof.key_averages())
    def counts(*names): return {k.key: k.count for k in found if any(n in k.key for n in names)}
    return dict(steps=steps, launches=counts('LaunchKernel','GraphLaunch'), waits=counts('cudaMemcpy','ynchronize'),
        device_ms=sum(getattr(k, 'self_device_time_total', 0) for k in found)/1e3)

def sampled(model, n):
    "Seconds of making cells, and of drawing their counts"
    took.clear()
    t = time.time()
    cells = model.sample(n, seed=0)
    return cells.X,dict(n=n, seconds=time.time()-t, draw=took.get('draw'))

def trained(model, a, cuda):
    "Seconds, losses and memory of training"
    took.clear()
    t = time.time()
    model.train(steps=a.steps or None, device=a.device, seed=0, progress=False)
    out = dict(seconds=time.time()-t, stages=dict(took), steps=model.history.groupby('stage').size().to_dict())
    losses = {k: float(h['loss'].tail(50).mean()) for k,h in model.history.groupby('stage')}
    return dict(out, losses=losses, memory_GB=torch.cuda.max_memory_allocated()/2**30 if cuda else None)

def judged(made, test):
    "A forest between made and test cells, their library sizes and their share of counts above zero"
    from scld.metrics import rf_auc
    auc = {p: float(rf_auc(test, made, p, 100, 0).mean()) for p in ('pcs-5fold','genes-5fold')}
    sizes,seen = ([float(v) for v in of] for of in zip(*((x.sum(1).mean(),(x>0).mean()) for x in (made,test))))
    return dict(auc, sizes=sizes, seen=seen)

def measure(a, data):
    "One set"
    cuda,c = a.device=='cuda',read_cells(a.cells, data, a.genes)
    if cuda: torch.zeros(8, device='cuda').sum().item() # Start the device
    model = SCLD(cells_of(c), labels='cell_type')
    row = dict(data=data, name=a.name, threads=a.threads, torch=torch.__version__, scld=scld.__file__,
        device=torch.cuda.get_device_name() if cuda else 'cpu', train=trained(model, a, cuda))
    made,few = sampled(model, N)
    row |= dict(sample=[few,sampled(model, a.many)[1]], same=bool((made!=model.sample(N, seed=0).X).nnz==0))
    if a.judge: row['judged'] = judged(made, c.test)
    if cuda: row['kernels'] = kernels(model)
    return row

def main():
    "All sets"
    p = argparse.ArgumentParser(description='The default model on a device')
    for k,v in dict(cells='.card', out='out', device='cuda', name='new', sets=','.join(SETS)).items():
        p.add_argument(f'--{k}', default=v)
    for k,v in dict(steps=600, threads=4, many=20_000, genes=0).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--judge', action='store_true')
    a = p.parse_args()
    warnings.simplefilter('ignore') # A model that trains for seconds says what its cells are worth
    torch.set_num_threads(a.threads)
    for name in STAGES: timed(SCLD, name, a.device=='cuda')
    timed(Autoencoder, 'draw', a.device=='cuda')
    for d in a.sets.split(','):
        row = json.dumps(measure(a, d))
        with open(Path(a.out)/f'speed-{a.name}.jsonl', 'a') as f: f.write(row+'\n')
        print(row, flush=True)

if __name__=='__main__': main()
