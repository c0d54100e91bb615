"""Cross-validation: a plan of jobs, each a plain bundle run, and the running of it, resumable at every job.

Nothing here imports PyTorch when it is imported: a worker first learns which GPU and how many threads are its own.
"""
