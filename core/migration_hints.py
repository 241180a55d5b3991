"""Names and options that users of Keras and PyTorch try first, each with the Sapwood code that replaces it.

There is one table for each place where a name may be typed. An entry is a tuple: the code to write, and optionally a
remark. `answer` turns an entry into the end of an error message; for a name without an entry it suggests the nearest
known name.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from sapwood.core.messages import nearest

_LAST = "channels come last"
_CALL = "a model is a function"
_READ = "the size of the input is read from the input"
_NO_RNN = "there are no recurrent layers yet; a cell in a scan, with its cursor passed in, is one"

LAYERS: dict[str, tuple[str, ...]] = {
    "linear": ("L.Dense(10)", _READ),
    "lazylinear": ("L.Dense(10)",),
    "conv1d": ("L.Conv(32, (3,))", _LAST),
    "conv2d": ("L.Conv(32, (3, 3))", _LAST),
    "conv3d": ("L.Conv(32, (3, 3, 3))", _LAST),
    "depthwiseconv2d": ("L.Conv(32, (3, 3), groups=32)", "as many groups and features as channels come in"),
    "separableconv2d": ("L.Conv(32, (3, 3), groups=32)", "and L.Conv(64, (1, 1)) after it"),
    "conv2dtranspose": ("jax.lax.conv_transpose", "with a kernel by v.param; there is no such layer yet"),
    "convtranspose2d": ("jax.lax.conv_transpose", "with a kernel by v.param; there is no such layer yet"),
    "upsampling2d": ("jax.image.resize",),
    "upsample": ("jax.image.resize",),
    "zeropadding2d": ("jnp.pad", "L.Conv takes padding="),
    "embedding": ("L.Embed(1000, 64)",),
    **{f"{kind}{n}d": (f"L.MaxPool(({', '.join(['2'] * n)}{',' * (n == 1)}))", _LAST)
       for kind in ("maxpooling", "maxpool") for n in (1, 2, 3)},
    **{f"{kind}{n}d": (f"L.AvgPool(({', '.join(['2'] * n)}{',' * (n == 1)}))", _LAST)
       for kind in ("averagepooling", "avgpool", "averagepool") for n in (1, 2, 3)},
    **{f"{kind}{n}d": ("L.GlobalAvgPool()",)
       for kind in ("globalaveragepooling", "adaptiveavgpool", "globalavgpool") for n in (1, 2, 3)},
    **{f"{kind}{n}d": ("L.GlobalMaxPool()",)
       for kind in ("globalmaxpooling", "adaptivemaxpool", "globalmaxpool") for n in (1, 2, 3)},
    "batchnormalization": ("L.BatchNorm()",),
    "batchnorm1d": ("L.BatchNorm()", _READ),
    "batchnorm2d": ("L.BatchNorm()", _READ),
    "batchnorm3d": ("L.BatchNorm()", _READ),
    "syncbatchnorm": ("L.BatchNorm()", "on a mesh its statistics are those of the whole batch"),
    "layernormalization": ("L.LayerNorm()",),
    "groupnormalization": ("L.GroupNorm(32)",),
    "rmsnormalization": ("L.RMSNorm()",),
    "instancenorm2d": ("L.GroupNorm(64)", "as many groups as channels"),
    "dropout1d": ("L.Dropout(0.1)",),
    "dropout2d": ("L.Dropout(0.1)",),
    "spatialdropout2d": ("L.Dropout(0.1)",),
    "multiheadattention": ("L.MultiHeadAttention(8)",),
    "selfattention": ("L.MultiHeadAttention(8)",),
    "scaleddotproductattention": ("L.attention",),
    "transformerencoderlayer": ("L.MultiHeadAttention(8)", "with L.LayerNorm() and L.Dense around it"),
    "transformer": ("sw.models.Decoder",),
    "activation": ("jax.nn.relu", "a plain function, in L.Sequential too"),
    **{name: (f"jax.nn.{function}",) for name, function in {
        "relu": "relu", "relu6": "relu6", "leakyrelu": "leaky_relu", "gelu": "gelu", "silu": "silu", "swish": "swish",
        "elu": "elu", "selu": "selu", "sigmoid": "sigmoid", "softmax": "softmax", "logsoftmax": "log_softmax",
        "softplus": "softplus", "mish": "mish", "tanh": "tanh", "hardswish": "hard_swish"}.items()},
    "prelu": ('lambda v, x: jnp.where(x > 0, x, v.param("slope", (), jax.nn.initializers.zeros) * x)',),
    "identity": ("lambda x: x", "any function of arrays stands in L.Sequential"),
    "lambda": ("lambda x: 2 * x", "any function of arrays stands in L.Sequential; sw.layer takes one with a cursor"),
    "rescaling": ("lambda x: x / 255",),
    "reshape": ("lambda x: x.reshape(len(x), 7, 7, 64)", "any function of arrays stands in L.Sequential"),
    "permute": ("lambda x: x.transpose(0, 2, 1)", "any function of arrays stands in L.Sequential"),
    "unflatten": ("lambda x: x.reshape(len(x), 7, 7, 64)", "any function of arrays stands in L.Sequential"),
    "concatenate": ("jnp.concatenate",),
    "add": ("jnp.add", "or x + y"),
    "multiply": ("jnp.multiply", "or x * y"),
    "average": ("jnp.add", "and / 2"),
    "dot": ("jnp.einsum",),
    "input": ("sw.init", "shapes come from the batch that it is given"),
    "inputlayer": ("sw.init", "shapes come from the batch that it is given"),
    "timedistributed": ("L.Dense(10)", "layers take any leading dimensions; jax.vmap is for the rest"),
    "lstm": ("jax.lax.scan", _NO_RNN),
    "gru": ("jax.lax.scan", _NO_RNN),
    "rnn": ("jax.lax.scan", _NO_RNN),
    "simplernn": ("jax.lax.scan", _NO_RNN),
    "lstmcell": ("jax.lax.scan", _NO_RNN),
    "grucell": ("jax.lax.scan", _NO_RNN),
    "bidirectional": ("jax.lax.scan", "which takes reverse=True; there are no recurrent layers yet"),
    "module": ("lambda v, x: L.Dense(10)(v.head, x)", _CALL),
    "layer": ("sw.Layer",),
    "model": ("lambda v, x: L.Dense(10)(v.head, x)", _CALL),
    "modulelist": ("L.Sequential([L.Dense(8), L.Dense(8)])", "or a loop over v.blocks[i]"),
    "moduledict": ('L.Sequential({"hidden": L.Dense(8), "head": L.Dense(8)})',),
    "parameter": ('lambda v, x: x * v.param("scale", (), jax.nn.initializers.ones)',),
    "functional": ("L.dense", "a name in lower case is a function of arrays"),
    "init": ("sw.initializers", "a layer takes kernel_init="),
    "initializers": ("sw.initializers", "a layer takes kernel_init="),
    **{name: (f'sw.supervised(model, "{loss}")',) for name, loss in {
        "crossentropyloss": "softmax_cross_entropy", "bcewithlogitsloss": "sigmoid_cross_entropy",
        "mseloss": "squared_error", "l1loss": "absolute_error", "huberloss": "huber", "smoothl1loss": "huber",
        "kldivloss": "kl_divergence"}.items()},
}  # fmt: skip
"""Names looked up in `sapwood.layers`, in lower case and without underscores."""

SAPWOOD: dict[str, tuple[str, ...]] = {
    "keras": ("from sapwood import layers as L",),
    "nn": ("from sapwood import layers as L", "activations are in jax.nn"),
    "optim": ("optax.adam(1e-3)", "optimizers are optax's"),
    "optimizers": ("optax.adam(1e-3)", "optimizers are optax's"),
    "adam": ("optax.adam(1e-3)", "optimizers are optax's"),
    "adamw": ("optax.adamw(1e-3)", "optimizers are optax's"),
    "sgd": ("optax.sgd(0.1)", "optimizers are optax's"),
    "losses": ("sw.train.losses",),
    "metrics": ("sw.train.metrics",),
    "callbacks": ("sw.train.callbacks",),
    "earlystopping": ("sw.train.EarlyStopping",),
    "modelcheckpoint": ("sw.train.Checkpoints", 'fit(run="runs/one") keeps them'),
    "datasets": ("sw.data.load",),
    "dataset": ("sw.data.Dataset",),
    "dataloader": ("sw.data.batches", "fit, evaluate and predict take the data set itself and a batch_size"),
    "tensordataset": ("sw.data.load",),
    "tensor": ("jnp.asarray", "arrays are JAX's or NumPy's"),
    "constant": ("jnp.asarray", "arrays are JAX's or NumPy's"),
    "variable": ('lambda v, x: x * v.param("scale", (), jax.nn.initializers.ones)',),
    "random": ("jax.random",),
    "manualseed": ("sw.init", "which takes a key or a seed, as fit does by seed="),
    "setrandomseed": ("sw.init", "which takes a key or a seed, as fit does by seed="),
    "device": ("sw.mesh", "arrays are on the accelerator from the beginning"),
    "cuda": ("jax.devices", "arrays are on the accelerator from the beginning"),
    "nograd": ("jax.lax.stop_gradient", "nothing has a gradient unless jax.grad takes it"),
    "grad": ("jax.grad",),
    "gradienttape": ("jax.grad", "or sw.Trainer, whose step does it"),
    "jit": ("jax.jit",),
    "vmap": ("L.Vmap", "or jax.vmap"),
    "compile": ("jax.jit", "a Trainer compiles by itself"),
    "function": ("jax.jit", "a Trainer compiles by itself"),
    "loadmodel": ("sw.load",),
    "savemodel": ("sw.save",),
    "fit": ("sw.Trainer(sw.supervised(model), optax.adam(1e-3)).fit",),
    "evaluate": ("sw.Trainer(sw.supervised(model), optax.adam(1e-3)).evaluate",),
    "predict": ("sw.Trainer(sw.supervised(model), optax.adam(1e-3)).predict",),
    "train": ("sw.train",),
    "plotmodel": ("sw.graph",),
    "mixedprecision": ("sw.Policy", 'Trainer(policy="bfloat16")'),
    "distribute": ("sw.mesh",),
    "checkpoint": ("sw.train.Checkpoints",),
}
"""Names looked up in `sapwood`. Those of `LAYERS` are looked up there, too."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "use_bias": ("bias=",),
    "activation": ("jax.nn.relu(L.Dense(10)(v.hidden, x))", "an activation is a call of its own"),
    "units": ("features=",),
    "out_features": ("features=",),
    "filters": ("features=",),
    "out_channels": ("features=",),
    "output_dim": ("features=",),
    "embedding_dim": ("features=",),
    "input_dim": ("vocab=", _READ),
    "num_embeddings": ("vocab=",),
    "vocab_size": ("vocab=",),
    "in_features": ("", _READ),
    "in_channels": ("", _READ),
    "input_shape": ("", _READ),
    "num_features": ("", _READ),
    "normalized_shape": ("", _READ),
    "num_channels": ("", _READ),
    "embed_dim": ("head_dim=", f"what a head has; {_READ}"),
    "pool_size": ("window=",),
    "kernel_size": ("window=",),
    "stride": ("strides=",),
    "dilation_rate": ("dilation=",),
    "data_format": ("", _LAST),
    "padding_mode": ("jnp.pad", "before the layer"),
    "epsilon": ("eps=",),
    "center": ("bias=",),
    "affine": ("scale=", "and bias="),
    "elementwise_affine": ("scale=", "and bias="),
    "num_groups": ("groups=",),
    "axis": ("", "the last dimension is that of the features"),
    "num_heads": ("heads=",),
    "key_dim": ("head_dim=",),
    "num_kv_heads": ("kv_heads=",),
    "batch_first": ("", "the batch always comes first"),
    "p": ("rate=",),
    "dropout": ("L.Dropout(0.1)(v.drop, x)", "dropout is a call of its own"),
    "attention_dropout": ("L.Dropout(0.1)(v.drop, x)", "dropout is a call of its own"),
    "mask_zero": ("", "pass the mask on: it is an input like any other"),
    "padding_idx": ("", "pass the mask on: it is an input like any other"),
    "kernel_initializer": ("kernel_init=",),
    "bias_initializer": ("bias_init=",),
    "embeddings_initializer": ("table_init=",),
    "gamma_initializer": ("scale_init=",),
    "kernel_regularizer": ("optax.adamw(1e-3)", "weight decay is the optimizer's; v.loss adds any other penalty"),
    "activity_regularizer": ('v.loss("activity", penalty)',),
    "name": ("L.Dense(10)(v.head, x)", "the name is the place in the cursor that the layer is called with"),
    "trainable": ('sw.Trainer(objective, optax.adam(1e-3), trainable="head")',),
    "dtype": ('sw.Trainer(objective, optax.adam(1e-3), policy="bfloat16")', "precision is the run's"),
    "device": ("sw.mesh",),
    "inplace": ("", "arrays never change"),
    "seed": ("", "the key is the run's: fit(seed=)"),
    "layer": ("layers=",),
}
"""Options of any layer. An entry that ends with ``=`` is an option, used only if the layer has it."""

TRAINER: dict[str, tuple[str, ...]] = {
    "model": ("objective=", "which sw.supervised(model, loss, metrics) makes"),
    "loss": ('sw.supervised(model, "squared_error")', "the objective, which a Trainer takes first"),
    "loss_fn": ('sw.supervised(model, "squared_error")', "the objective, which a Trainer takes first"),
    "criterion": ('sw.supervised(model, "squared_error")', "the objective, which a Trainer takes first"),
    "metrics": ('sw.supervised(model, metrics=["accuracy"])', "the objective, which a Trainer takes first"),
    "lr": ("optax.adam(1e-3)", "the learning rate is the optimizer's"),
    "optim": ("optimizer=",),
    "devices": ("mesh=",),
    "strategy": ("mesh=",),
    "precision": ("policy=",),
    "dtype": ("policy=",),
    "max_epochs": ("trainer.fit(data, epochs=2)",),
    "callbacks": ("trainer.fit(data, epochs=2, callbacks=[])",),
    "gradient_clip_val": ("clip=",),
    "clipnorm": ("clip=",),
    "accumulate_grad_batches": ("accumulate=",),
    "gradient_accumulation_steps": ("accumulate=",),
    "run_eagerly": ("jit=",),
    "jit_compile": ("jit=",),
}
"""Options of `Trainer`."""

FIT: dict[str, tuple[str, ...]] = {
    "x": ("trainer.fit((x, y), epochs=2)", "inputs and labels are one data set"),
    "y": ("trainer.fit((x, y), epochs=2)", "inputs and labels are one data set"),
    "validation_data": ("validation=",),
    "validation_split": ("validation=", "0.2 holds a fifth of the data out, drawn by seed="),
    "validation_batch_size": ("trainer.evaluate(state, data, batch_size=32)",),
    "val_dataloaders": ("validation=",),
    "verbose": ("progress=",),
    "shuffle": ("", "every epoch is shuffled, by seed="),
    "initial_epoch": ("state=", "its step says how much is done"),
    "steps_per_epoch": ("steps=", "in all"),
    "max_epochs": ("epochs=",),
    "num_epochs": ("epochs=",),
    "nb_epoch": ("epochs=",),
    "max_steps": ("steps=",),
    "class_weight": ('data.weighted("balanced")', "or a dict by class"),
    "sample_weight": ('sw.data.load({"features": x, "label": y, "weight": w})', 'an entry "weight" counts as such'),
    "ckpt_path": ("run=", "and resume="),
    "log_dir": ("run=",),
    "model": ("sw.Trainer(sw.supervised(model), optax.adam(1e-3))",),
    "lr": ("optax.adam(1e-3)", "the learning rate is the optimizer's"),
    "epoch": ("epochs=",),
    "batch": ("batch_size=",),
}
"""Options of `Trainer.fit`."""

SUPERVISED: dict[str, tuple[str, ...]] = {
    "optimizer": ("sw.Trainer(objective, optax.adam(1e-3))", "which takes it"),
    "loss_weights": ("lambda v, batch: (first + 0.5 * second, {})", "an objective of one's own"),
    "loss_fn": ("loss=",),
    "criterion": ("loss=",),
    "metric": ("metrics=",),
    "weighted_metrics": ("metrics=", "they count weights"),
    "input": ("inputs=",),
    "features": ("inputs=",),
    "x": ("inputs=",),
    "label": ("target=",),
    "labels": ("target=",),
    "targets": ("target=",),
    "y": ("target=",),
    "from_logits": ("", "the losses by name take logits"),
    "run_eagerly": ("sw.Trainer(objective, optax.adam(1e-3), jit=False)",),
}
"""Options of `supervised`."""

EVALUATE: dict[str, tuple[str, ...]] = {
    "x": ("trainer.evaluate(state, (x, y))", "inputs and labels are one data set"),
    "y": ("trainer.evaluate(state, (x, y))", "inputs and labels are one data set"),
    "verbose": ("", "it prints nothing"),
    "return_dict": ("", "evaluate always gives a dict"),
    "sample_weight": ('sw.data.load({"features": x, "label": y, "weight": w})', 'an entry "weight" counts as such'),
    "steps": ("data.take(4)", "the whole data set is read"),
    "callbacks": ("trainer.fit(data, epochs=2, callbacks=[])",),
    "batch": ("batch_size=",),
    "model": ("sw.Trainer(sw.supervised(model), optax.adam(1e-3))",),
    "metrics": ('sw.supervised(model, metrics=["accuracy"])', "the objective, which a Trainer takes first"),
}
"""Options of `Trainer.evaluate` and `Trainer.predict`."""

LOAD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("label", "labels", "y", "label_column", "label_name", "target_column", "target_name"),
                    ("target=",)),
    **dict.fromkeys(("image_size", "img_size", "target_size", "resize"), ("size=",)),
    **dict.fromkeys(("class_names", "label_names", "num_classes"), ("classes=",)),
    **dict.fromkeys(("weights", "sample_weight", "class_weight"), ("weight=", "a column; or data.weighted")),
    **dict.fromkeys(("validation_split", "test_size", "val_split"), ("validation=", "the pair is given back")),
    "random_state": ("seed=",),
    "usecols": ("columns=",),
    "select_columns": ("columns=",),
    "feature_columns": ("columns=",),
    "drop": ("columns=", "those to read"),
    "names": ("columns=", "and header=False"),
    **dict.fromkeys(("sep", "delimiter", "decimal", "na_values", "dtype", "parse_dates", "index_col", "encoding"),
                    ("", "read the file with pandas.read_csv, and load the frame")),
    "batch_size": ("trainer.fit(data, epochs=2, batch_size=32)", "and sw.data.batches in a loop of one's own"),
    "shuffle": ("", "fit shuffles every epoch, by its seed="),
    "subset": ("split=", "or validation=, which gives both parts"),
    "train": ("split=",),
    "root": ("data_dir=",),
    "download": ("", "sw.data.load says what to write where a data set is not there"),
    **dict.fromkeys(("transform", "preprocess"), ("data.map(lambda example: example)", "of an example, a dict")),
    "color_mode": ("", "pictures that are all grey have one channel"),
    "label_mode": ("", "a folder's label is an integer, the number of its class"),
    "remember_in_memory": ("remember=",),
    "cache": ("remember=",),
}  # fmt: skip
"""Options of `sapwood.data.load`."""

DATA: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("imagedatasetfromdirectory", "imagefolder", "datasetfolder", "flowfromdirectory"),
                    ("sw.data.load", "which takes the folder")),
    "imagedatagenerator": ("sw.data.load", "which takes the folder; the model moves its images where v.train"),
    **dict.fromkeys(("textdatasetfromdirectory", "textlinedataset"), ("sw.data.characters", "or your own data.map")),
    **dict.fromkeys(("dataloader", "iterator"),
                    ("sw.data.batches", "fit, evaluate and predict take the data set itself and a batch_size")),
    **dict.fromkeys(("tensordataset", "fromtensorslices", "fromarrays", "fromnumpy", "frompandas", "arraydataset",
                     "fromgenerator", "fromdict", "fromtensors", "frompolars", "readcsv", "makecsvdataset",
                     "csvdataset", "loaddataset", "loadcsv", "fromcsv", "readparquet"), ("sw.data.load",)),
    **dict.fromkeys(("randomsplit", "traintestsplit", "splitdataset"), ("data.split(0.2)",)),
    "subset": ("data.select([0, 2])",),
    "concatdataset": ("sw.data.load", "of the arrays put together"),
    "weightedrandomsampler": ('data.weighted("balanced")', "which weighs, and draws all alike"),
    "transforms": ("data.map(lambda example: example)", "of an example, a dict"),
}  # fmt: skip
"""Names looked up in `sapwood.data`, in lower case and without underscores."""

DATASET: dict[str, tuple[str, ...]] = {
    "batch": ("sw.data.batches(data, 4)", "fit, evaluate and predict take the data set itself and a batch_size"),
    "shuffle": ("sw.data.batches(data, 4, seed=0)", "and fit shuffles every epoch, by its seed="),
    "repeat": ("sw.data.batches(data, 4, epochs=2)", "and fit takes epochs="),
    "prefetch": ("sw.data.to_device", "fit reads ahead by itself"),
    "cache": ("sw.data.load", "which takes remember=True"),
    "filter": ("data.select([0, 2])", "of the indices to keep, as np.flatnonzero gives them"),
    "skip": ("data[2:]",),
    "head": ("data.take(2)",),
    "iloc": ("data[0]", "and data[2:]"),
    "shard": ("data[0::2]",),
    "unbatch": ("data[0]", "a data set is of examples"),
    **dict.fromkeys(("train_test_split", "random_split"), ("data.split(0.2)",)),
    **dict.fromkeys(("class_names", "classes", "class_to_idx", "names"), ('data.features["label"].classes',)),
    "num_classes": ('data.features["label"].num_classes',),
    **dict.fromkeys(("columns", "column_names", "feature_names", "element_spec", "shape", "dtypes"),
                    ("data.features", "which says of each entry what it is; len(data) is the number of examples")),
    **dict.fromkeys(("apply", "with_transform", "set_transform", "map_batches", "transform"),
                    ("data.map(lambda example: example)",)),
    **dict.fromkeys(("to_numpy", "as_numpy", "as_numpy_iterator", "numpy", "to_pandas", "to_dict", "values"),
                    ("data.gather(range(len(data)))", "a dict of arrays")),
    **dict.fromkeys(("labels", "targets", "target", "label", "y"), ('data.column("label")',)),
    "data": ('data.column("features")',),
    "class_weight": ('data.weighted("balanced")',),
    "concatenate": ("sw.data.load", "of the arrays put together"),
    "size": ("len(data)",),
    "cardinality": ("len(data)",),
}  # fmt: skip
"""Methods and attributes of a `Dataset`."""

TRAIN: dict[str, tuple[str, ...]] = {
    "modelcheckpoint": ('trainer.fit(data, epochs=2, run="runs/one", best="min:loss")',),
    "backupandrestore": ('trainer.fit(data, epochs=2, run="runs/one", resume=True)',),
    "tensorboard": ('trainer.fit(data, epochs=2, run="runs/one")', "which writes its events"),
    "summarywriter": ('trainer.fit(data, epochs=2, run="runs/one")', "which writes TensorBoard events"),
    "csvlogger": ('trainer.fit(data, epochs=2, run="runs/one")', "which writes metrics.jsonl"),
    "history": ("trainer.fit(data, epochs=2).history", "which fit gives back, with the state"),
    "progbarlogger": ("trainer.fit(data, epochs=2, progress=True)",),
    **dict.fromkeys(("learningratescheduler", "lambdalr", "steplr", "cosineannealinglr", "lrscheduler", "onecyclelr"),
                    ("optax.cosine_decay_schedule(1e-3, 100)", "a schedule is given to the optimizer")),
    "reducelronplateau": ("sw.train.ReduceOnPlateau()",),
    "terminateonnan": ("sw.Trainer(objective, optax.adam(1e-3), checks=True)", "as it is unless said"),
    "lambdacallback": ("sw.train.OnEpoch(print)", "or a function (event, memory)"),
    "earlystop": ("sw.train.EarlyStopping()",),
    "swa": ("sw.Trainer(objective, optax.adam(1e-3), ema=0.999)",),
    "exponentialmovingaverage": ("sw.Trainer(objective, optax.adam(1e-3), ema=0.999)",),
    "gradscaler": ("sw.train.LossScale", 'policy="float16" brings it'),
    "optimizers": ("optax.adam(1e-3)", "optimizers are optax's"),
    "adam": ("optax.adam(1e-3)", "optimizers are optax's"),
    "sgd": ("optax.sgd(0.1)", "optimizers are optax's"),
    "accuracy": ("sw.train.metrics.accuracy",),
    "save": ("sw.save",),
    "load": ("sw.load",),
    "evaluate": ("sw.Trainer(sw.supervised(model), optax.adam(1e-3)).evaluate",),
    "predict": ("sw.Trainer(sw.supervised(model), optax.adam(1e-3)).predict",),
}  # fmt: skip
"""Names looked up in `sapwood.train` and `sapwood.train.callbacks`, in lower case and without underscores."""

CALLBACKS: dict[str, tuple[str, ...]] = {
    "min_delta": ("delta=",),
    "threshold": ("delta=",),
    "restore_best_weights": ("restore=",),
    "min_lr": ("least=",),
    "save_best_only": ("restore=",),
    "metric": ("monitor=",),
    "verbose": ("", "the rows of fit show it"),
    "baseline": ("sw.train.StopAt", "which stops at a value"),
    "start_from_epoch": ("patience=",),
    "filepath": ('trainer.fit(data, epochs=2, run="runs/one")',),
}
"""Options of `EarlyStopping`, `ReduceOnPlateau` and `StopAt`."""

STATE: dict[str, tuple[str, ...]] = {
    "save": ("sw.save", "which takes state.params, or fit(run=), which writes the whole state"),
    "load": ("sw.load",),
    **dict.fromkeys(("weights", "variables", "parameters", "get_weights", "state_dict", "trainable_variables"),
                    ("", "they are state.params, a nested dict")),
    **dict.fromkeys(("batch_stats", "model_state", "buffers"), ("", "they are state.state, a nested dict")),
    "optimizer": ("", "its memory is state.opt_state"),
    "predict": ("trainer.predict", "which takes the state first"),
    "evaluate": ("trainer.evaluate", "which takes the state first"),
    "fit": ("trainer.fit", "which takes state="),
    "history": ("trainer.fit(data, epochs=2).history", "fit gives both: state, history = trainer.fit(...)"),
    "apply_gradients": ("trainer.step", "which is a step; sw.TrainState holds arrays alone"),
    "apply_fn": ("sw.apply(model, params, state, x)",),
    "epoch": ("", "state.step counts batches"),
}  # fmt: skip
"""Methods and attributes of a `TrainState`."""

METHODS: dict[str, tuple[str, ...]] = {
    "compiling": ("", "it is trainer.tracing() now"),
    "predict_proba": ("jax.nn.softmax", "of the logits that trainer.predict gives"),
    "predict_classes": ("jnp.argmax", "of the logits that trainer.predict gives"),
    "partial_fit": ("trainer.fit", "which takes state="),
    "compile": ('sw.Trainer(sw.supervised(model, "squared_error"), optax.adam(1e-3))', "it compiles by itself"),
    "summary": ("sw.summary(model, x)",),
    "fit": ("sw.Trainer(sw.supervised(model), optax.adam(1e-3)).fit",),
    "evaluate": ("sw.Trainer(sw.supervised(model), optax.adam(1e-3)).evaluate",),
    "predict": ("sw.Trainer(sw.supervised(model), optax.adam(1e-3)).predict",),
    "train": ("sw.apply(model, params, state, x, rng=0, train=True)", "the mode is the run's"),
    "eval": ("sw.apply(model, params, state, x)", "the mode is the run's"),
    "requires_grad_": ('sw.Trainer(objective, optax.adam(1e-3), trainable="head")',),
    "trainable": ('sw.Trainer(objective, optax.adam(1e-3), trainable="head")',),
    "parameters": (
        "sw.init(model, 0, x)",
        "which gives them: they are apart from the layer, state.params while training",
    ),
    "named_parameters": ("sw.init(model, 0, x)", "which gives them: they are apart from the layer"),
    "weights": ("sw.init(model, 0, x)", "which gives them: they are apart from the layer"),
    "trainable_variables": ("sw.init(model, 0, x)", "which gives them: they are apart from the layer"),
    "variables": ("sw.init(model, 0, x)", "which gives them: they are apart from the layer"),
    "weight": ("sw.init(model, 0, x)", "which gives them: they are apart from the layer"),
    "kernel": ("sw.init(model, 0, x)", "which gives them: they are apart from the layer"),
    "get_weights": ("sw.init(model, 0, x)", "which gives them: they are apart from the layer"),
    "set_weights": ("trainer.init(0, batch, params=params)",),
    "state_dict": ("sw.init(model, 0, x)", "which gives them: they are apart from the layer"),
    "load_state_dict": ("sw.load",),
    "load_weights": ("sw.load",),
    "save": ("sw.save",),
    "save_weights": ("sw.save",),
    "load": ("sw.load",),
    "forward": ("model(params, x)", "a layer is called, with its variables first"),
    "call": ("model(params, x)", "a layer is called, with its variables first"),
    "apply": ("sw.apply(model, params, state, x)",),
    "init": ("sw.init(model, 0, x)",),
    "build": ("sw.init(model, 0, x)", "shapes come from the batch that it is given"),
    "add": ("L.Sequential([L.Dense(8), L.Dense(8)])", "its layers are given at once"),
    "append": ("L.Sequential([L.Dense(8), L.Dense(8)])", "its layers are given at once"),
    "to": ("sw.mesh", "arrays are on the accelerator from the beginning"),
    "cuda": ("jax.devices", "arrays are on the accelerator from the beginning"),
    "cpu": ("jax.device_get",),
    "half": ('sw.Trainer(objective, optax.adam(1e-3), policy="float16")',),
    "zero_grad": ("jax.grad", "gradients are values: nothing is to be cleared"),
    "backward": ("jax.grad", "or trainer.step"),
    "train_on_batch": ("trainer.step(trainer.init(0, batch), batch)", "compiled by jax.jit"),
    "train_step": ("trainer.step(trainer.init(0, batch), batch)", "compiled by jax.jit"),
    "test_on_batch": ("trainer.evaluate",),
    "predict_on_batch": ("trainer.predict",),
    "test": ("trainer.evaluate",),
    "validate": ("trainer.evaluate",),
    "score": ("trainer.evaluate",),
    "history": ("trainer.fit(data, epochs=2).history", "which fit gives back, with the state"),
    "loss": ("trainer.objective",),
    "model": ("trainer.objective.model",),
    "layers": ("L.Sequential([L.Dense(8)]).layers",),
    "plot": ("sw.graph(model, x)",),
}
"""Methods and attributes of models, layers and trainers."""


_SIGMOID = "which takes logits: the model ends without a sigmoid"
_SOFTMAX = "which takes logits: the model ends without a softmax"

LOSSES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mse", "meansquarederror", "mseloss", "l2"), ('"squared_error"',)),
    **dict.fromkeys(("mae", "meanabsoluteerror", "l1", "l1loss"), ('"absolute_error"',)),
    **dict.fromkeys(("bce", "binarycrossentropy", "bceloss", "bcewithlogits", "bcewithlogitsloss", "logloss"),
                    ('"sigmoid_cross_entropy"', _SIGMOID)),
    **dict.fromkeys(("crossentropy", "crossentropyloss", "categoricalcrossentropy", "sparsecategoricalcrossentropy",
                     "nll", "nllloss"), ('"softmax_cross_entropy"', _SOFTMAX)),
    **dict.fromkeys(("kl", "kld", "kldiv", "kldivloss", "kullbackleiblerdivergence"),
                    ('"kl_divergence"', "which takes log-probabilities: jax.nn.log_softmax of logits")),
    **dict.fromkeys(("smoothl1", "smoothl1loss", "huberloss"), ('"huber"',)),
    "logcosh": ('"log_cosh"',),
    "cosinesimilarity": ('"cosine_distance"', "one minus it"),
    "binaryfocalcrossentropy": ('"focal"', _SIGMOID),
}  # fmt: skip
"""Names of losses, as in ``sw.supervised(model, "mse")``."""

METRICS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("acc", "categoricalaccuracy", "sparsecategoricalaccuracy", "accuracyscore"), ('"accuracy"',)),
    **dict.fromkeys(("topkaccuracy", "topkcategoricalaccuracy"), ('"top_5_accuracy"',)),
    "confusionmatrix": ('"confusion"',),
    "precisionscore": ('"precision"', 'of classes, and "binary_precision" of labels'),
    "recallscore": ('"recall"', 'of classes, and "binary_recall" of labels'),
    **dict.fromkeys(("f1score", "f1macro", "fscore"), ('"f1"', 'of classes, and "binary_f1" of labels')),
    **dict.fromkeys(("balancedaccuracy", "balancedaccuracyscore"), ('"recall"', "its mean over the classes")),
    **dict.fromkeys(("exactmatch", "subsetaccuracyscore"), ('"subset_accuracy"',)),
    **dict.fromkeys(("hammingloss", "hamming"), ('"binary_accuracy"', "which is one minus it")),
    **dict.fromkeys(("rocauc", "rocaucscore", "auroc"), ('"auc"',)),
    "mse": ('"mean_squared_error"',),
    "mae": ('"mean_absolute_error"',),
    "rmse": ('"root_mean_squared_error"',),
    "r2score": ('"r2"',),
    "ppl": ('"perplexity"',),
    **dict.fromkeys(("bce", "binarycrossentropy", "crossentropy", "logloss"), ("", "the loss is in every row already")),
}  # fmt: skip
"""Names of metrics, as in ``sw.supervised(model, loss, metrics=["acc"])``."""


def answer(table: dict[str, tuple[str, ...]], name: str, known: Collection[str] = ()) -> str:
    """The end of an error message about an unknown ``name``: the code to write, or the nearest names in ``known``.

    An entry for an option, such as ``bias=``, is used only if ``known`` has that option.

    >>> answer(LAYERS, "Conv2D")
    ': here it is L.Conv(32, (3, 3)), channels come last'
    >>> answer({}, "Dens", ["Dense", "Conv"])
    "; did you mean 'Dense'?"
    """
    code, *word = table.get(name) or table.get(name.replace("_", "").lower()) or (None,)
    if code is None or (code.endswith("=") and code[:-1] not in known):
        return nearest(name, known)
    if not code:
        return f": {word[0]}"
    return f": here it is {code}{f', {word[0]}' if word else ''}"


def answering(who: str, table: dict[str, tuple[str, ...]]) -> Callable[[Callable], Callable]:
    """A decorator: if the function is called with an unknown option, the `TypeError` says what to write.

    ``who`` is the function's name in the message, ``table`` the table of its options.

    >>> @answering("fit", FIT)
    ... def fit(data, *, epochs=1, validation=None):
    ...     return epochs
    >>> fit([], validation_data=[])
    Traceback (most recent call last):
    TypeError: fit has no option 'validation_data': here it is validation=
    """

    def around(function: Callable) -> Callable:
        code = inspect.unwrap(function).__code__
        known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]

        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            for name in options:
                if name not in known:
                    raise TypeError(f"{who} has no option {name!r}{answer(table, name, known)}")
            return function(*args, **options)

        return run

    return around


def meant(values: Sequence[Any]) -> str:
    """The end of an error message about values that a layer does not take by position: what was probably meant.

    >>> meant([10]), meant([len, max])
    ('; the size of the input is read from the input', '; several layers go into one list, Sequential([...])')
    """
    if len(values) > 1 and all(map(callable, values)):
        return "; several layers go into one list, Sequential([...])"
    if isinstance(values[-1], str) or callable(values[-1]):
        return f"; {OPTIONS['activation'][1]}, such as {OPTIONS['activation'][0]}"
    return f"; {_READ}" if isinstance(values[-1], int) else ""


def missing(module: str, table: dict[str, tuple[str, ...]], name: str, known: Collection[str]) -> Any:
    """Raise the `AttributeError` of a module without the attribute ``name``.

    Args:
        module: the module's name.
        table: the table of names to answer from.
        name: the attribute.
        known: the names that the module has.
    """
    word = "" if name.startswith("_") else answer(table, name, known)
    raise AttributeError(f"module {module!r} has no attribute {name!r}{word}")


def attribute(x: Any, name: str, table: dict[str, tuple[str, ...]] | None = None) -> AttributeError:
    """The `AttributeError` of an object ``x`` without the attribute ``name``. None for ``table`` is `METHODS`.

    If ``name`` is a property that failed, its own error is raised instead.
    """
    if not name.startswith("_") and hasattr(type(x), name):
        object.__getattribute__(x, name)
    table = METHODS if table is None else table
    known = [field for field in getattr(type(x), "__dataclass_fields__", ()) if not field.startswith("_")]
    word = "" if name.startswith("_") else answer(table, name, known)
    return AttributeError(f"{type(x).__name__!r} object has no attribute {name!r}{word}", name=name, obj=x)
