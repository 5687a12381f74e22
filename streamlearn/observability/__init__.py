"""The section `log`. The series are in `streamlearn.metrics`, and the format of log lines is in `streamlearn.logs`."""
