"""Cross-validation: a plan of jobs, each a plain bundle run, for a pool of processes here or Snakemake anywhere."""
