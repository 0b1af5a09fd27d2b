{{- define "entropyserve.name" -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}-entropyserve
{{- end }}
{{- define "entropyserve.selector" -}}
app.kubernetes.io/name: entropyserve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "entropyserve.labels" -}}
{{ include "entropyserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
