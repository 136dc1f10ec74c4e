{{- define "breakeven.name" -}}
{{- $name := contains "breakeven" .Release.Name | ternary .Release.Name (printf "%s-breakeven" .Release.Name) -}}
{{ $name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Pods' own labels. KubeRay gives them app.kubernetes.io/name and finds its head by that; and what
changes with the chart's version would have it start a second cluster. */}}
{{- define "breakeven.selector" -}}
breakeven/release: {{ .Release.Name }}
{{- end }}

{{- define "breakeven.labels" -}}
app.kubernetes.io/name: breakeven
app.kubernetes.io/instance: {{ .Release.Name }}
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
