"""Write a small folder of cells with `write_10x`, and beside it what R should find there: `read_10x.R` compares.

Types have a comma, a quote and a missing value, genes have identifiers that are not their names.
"""
import numpy as np, pandas as pd
from fastcore.script import call_parse
from scld.data import toy_cells
from scld.files import write_10x

@call_parse
def main(
    folder:str, # Folder to make; totals go to `folder_genes.csv` and `folder_cells.csv`
):
    "Write cells for R"
    cells = toy_cells(200)
    names = {'type 0': 'NK, CD56+', 'type 1': 'the "other" T', 'type 2': None}
    cells.obs['cell_type'] = pd.Categorical(cells.obs['cell_type'].astype(str).map(names))
    cells.obs['dose'] = np.arange(200)/4
    cells.var_names = ['1e5','NA',"5'-nt",*cells.var_names[3:]]
    cells.var['gene_ids'] = [f'ENSG{i:011}' for i in range(cells.n_vars)]
    write_10x(cells, folder)
    x = cells.to_df()
    genes = dict(name=cells.var_names, id=cells.var['gene_ids'], total=x.sum())
    of_cells = dict(name=cells.obs_names, total=x.sum(1), squares=(x**2).sum(1), cell_type=cells.obs['cell_type'], dose=cells.obs['dose'])
    for k,table in dict(genes=genes, cells=of_cells).items(): pd.DataFrame(table).to_csv(f'{folder}_{k}.csv', index=False)
