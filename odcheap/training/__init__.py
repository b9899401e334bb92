"""The LightningModule, callbacks and the experiment."""
