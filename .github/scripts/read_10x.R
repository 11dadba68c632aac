# A folder that `write_10x` wrote, read as nbs/tutorials/r_users.ipynb says, and compared with what Python knows of it.
# Rscript read_10x.R FOLDER: beside the files of the folder there are FOLDER_genes.csv and FOLDER_cells.csv, with totals.
library(Matrix)
folder <- commandArgs(trailingOnly = TRUE)[1]
at <- function(name) gzfile(file.path(folder, name))
counts <- as(readMM(at("matrix.mtx.gz")), "CsparseMatrix")
genes <- read.delim(at("features.tsv.gz"), header = FALSE, quote = "", na.strings = "",
                    colClasses = "character", col.names = c("id", "name", "type"))
cells <- read.csv(at("cells.csv.gz"), row.names = "barcode", na.strings = "",
                  check.names = FALSE, stringsAsFactors = TRUE)
rownames(genes) <- make.unique(genes$name)
dimnames(counts) <- list(rownames(genes), rownames(cells))

known <- function(what) read.csv(paste0(folder, "_", what, ".csv"), colClasses = c(name = "character"), na.strings = "")
of_genes <- known("genes")
of_cells <- known("cells")
stopifnot(
  "dimensions" = identical(dim(counts), c(nrow(of_genes), nrow(of_cells))),
  "barcodes" = identical(readLines(at("barcodes.tsv.gz")), colnames(counts)),
  "names of genes" = identical(rownames(counts), of_genes$name),
  "identifiers of genes" = identical(genes$id, of_genes$id),
  "names of cells" = identical(colnames(counts), of_cells$name),
  "sums by gene" = all(rowSums(counts) == of_genes$total),
  "sums by cell" = all(colSums(counts) == of_cells$total),
  "squares by cell" = all(colSums(counts^2) == of_cells$squares),
  "types" = identical(as.character(cells$cell_type), of_cells$cell_type),
  "missing types" = anyNA(cells$cell_type),
  "numbers" = is.numeric(cells$dose) && all(cells$dose == of_cells$dose)
)
cat(nrow(counts), "genes and", ncol(counts), "cells as Python wrote them, in", R.version.string, "\n")
