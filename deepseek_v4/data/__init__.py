"""Training data: files of documents in, batches of packed token rows out (start at ``dataset``)."""

from deepseek_v4.data.dataset import Batch, DataConfig, Dataset, Prefetcher, Statistics, open_data
from deepseek_v4.data.sources import DataError

__all__ = ["Batch", "DataConfig", "DataError", "Dataset", "Prefetcher", "Statistics", "open_data"]
