{{- define "breakeven.name" -}}
{{- $name := contains "breakeven" .Release.Name | ternary .Release.Name (printf "%s-breakeven" .Release.Name) -}}
{{ $name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "breakeven.selector" -}}
app.kubernetes.io/name: breakeven
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "breakeven.labels" -}}
{{ include "breakeven.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "breakeven.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "breakeven.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "breakeven.name" .) }}
{{- end }}

{{- define "breakeven.clusterKey" -}}
{{ .Values.secrets.cluster | default (printf "%s-cluster" (include "breakeven.name" .)) }}
{{- end }}

{{- define "breakeven.claim" -}}
{{ .Values.cache.claim | default (include "breakeven.name" .) }}
{{- end }}
